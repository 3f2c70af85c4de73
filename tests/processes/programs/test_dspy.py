"""DSPy's modules as programs, with the real package; in an environment of its own: `pip install -e '.[test,dspy]'`."""

import pytest

from flashgrpo.types import Failed
from tests.processes.programs.test_programs import drawn

dspy = pytest.importorskip("dspy", reason="dspy is not installed")

from flashgrpo.processes.programs.dspy_modules import as_program  # noqa: E402


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.plan = dspy.Predict("question, color -> plan")
        self.answer = dspy.Predict("plan -> answer")

    def forward(self, question, color):
        plan = self.plan(question=question, color=color).plan
        return self.answer(plan=plan)


def answers(*texts):
    left, asked = iter(texts), []

    def call(module, text):
        asked.append((module, text))
        return next(left)

    return call, asked


def test_predictors_are_the_modules_of_a_program():
    program = as_program(Two(), takes="question", gives="answer", columns=["color"])
    call, asked = answers("[[ ## plan ## ]]\nleft\n[[ ## completed ## ]]", "[[ ## answer ## ]]\n42\n")
    assert program("how many?", call, color="red", other=1) == "42"
    assert [module for module, _ in asked] == ["plan", "answer"]
    assert "how many?" in asked[0][1]
    assert "red" in asked[0][1]
    assert "left" in asked[1][1]


@pytest.mark.parametrize("text", ["", "something else"])
def test_a_completion_of_another_form_is_a_failure_and_is_asked_for_once(text):
    call, asked = answers(text)
    with pytest.raises(ValueError, match="not of its signature's form"):
        as_program(Two(), "question", "answer", ["color"])("x", call, color="red")
    assert len(asked) == 1


def test_a_mistake_of_the_program_is_no_failed_completion():
    """ValueError and LookupError would earn the failure reward, for ever and without a word."""
    with pytest.raises(TypeError, match="the prompt has no column colour"):
        as_program(Two(), "question", "answer", ["colour"])("x", answers()[0], color="red")
    call, _ = answers("[[ ## plan ## ]]\nleft\n", "[[ ## answer ## ]]\n42\n")
    with pytest.raises(TypeError, match="the module gives no result, but answer"):
        as_program(Two(), "question", "result", ["color"])("x", call, color="red")


def test_what_a_tiny_model_writes_is_recorded():
    """Its random words are of no form, so each run fails at its first call, which is a unit all the same."""
    program = as_program(dspy.Predict("a -> b"), takes="a", gives="b")
    _, outputs, record = drawn(lambda prompt, call, **columns: program("1", lambda module, _: call(module, prompt)))
    assert all(isinstance(output, Failed) for output in outputs)
    assert len(record) == 4
