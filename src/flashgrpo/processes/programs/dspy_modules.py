"""A `dspy.Module` as a program: what its predictors ask for is written by the model that is trained.

Needs DSPy of 3.4 or newer (`pip install 'flash-grpo[dspy]'`); nothing else of this library imports it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import dspy
from dspy import lm15
from dspy.utils.exceptions import AdapterParseError

from flashgrpo.processes.programs.examples import Call


class Engine:
    """Hands the requests of one predictor to `call`, as one text: system, and then what was said, a paragraph each."""

    def __init__(self, call: Call, module: str) -> None:
        self._call, self._module = call, module

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Answer a request."""
        system = request.system if isinstance(request.system, str) else _text(request.system or ())
        said = [system, *(_text(message.parts) for message in request.messages)]
        written = self._call(self._module, "\n\n".join(text for text in said if text))
        return lm15.Response(None, request.model, lm15.Message.assistant(written or " "), "stop", lm15.Usage())


def _text(parts: Sequence[Any]) -> str:
    return "\n".join(part.text for part in parts if hasattr(part, "text"))


def as_program(module: dspy.Module, takes: str, gives: str, columns: Sequence[str] = ()) -> Callable[..., str]:
    """Return a program that runs a DSPy module. Its calls' modules are the names of the module's predictors.

    A completion that DSPy cannot parse is a failure, and is not asked for again in another form.

    Example, in `my_program.py`, of which a recipe names `my_program.py:solve`:

        solve = as_program(dspy.ChainOfThought("question -> answer"), takes="question", gives="answer")

    Args:
        takes: input field that gets the prompt.
        gives: output field that is the program's result.
        columns: further columns of the prompt file that are input fields.

    Raises:
        TypeError: in a run, for a column that the prompt does not have or an output field that the module does not: a
            mistake of the program, which must not look like a completion that failed.
    """

    def program(prompt: str, call: Call, **given: Any) -> str:
        if missing := [name for name in columns if name not in given]:
            raise TypeError(f"the prompt has no column {', '.join(missing)}")
        own = module.deepcopy()
        for name, predictor in own.named_predictors():
            predictor.lm = dspy.LM("flashgrpo/trained", engine=Engine(call, name), cache=False, num_retries=0)
        inputs = {takes: prompt, **{name: given[name] for name in columns}}
        with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
            try:
                found = own(**inputs)
            except AdapterParseError as error:
                raise ValueError("a completion is not of its signature's form") from error
        if gives not in found:
            raise TypeError(f"the module gives no {gives}, but {', '.join(found.keys())}")
        return str(found[gives])

    return program
