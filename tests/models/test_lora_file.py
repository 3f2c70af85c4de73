"""The file of adapters: equal runs write equal bytes."""

import json

from safetensors import safe_open

from flashgrpo.models.lora import _in_order, trained_parameters


def test_sets_of_its_header_are_written_in_order(make_model, tmp_path):
    """The order of a set of texts is another in each process."""
    model = make_model()
    [name] = model.save_lora(tmp_path, trained_parameters(model.network))
    with safe_open(tmp_path / name, framework="pt") as file:
        [text] = [value for value in file.metadata().values() if "target_modules" in value]
    [targets] = [value for key, value in json.loads(text).items() if key.endswith("target_modules")]
    assert targets == sorted(targets)
    assert len(targets) > 2
    assert _in_order({"a": {"c", "b"}, "d": 1}) == {"a": ["b", "c"], "d": 1}
