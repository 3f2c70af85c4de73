"""Prompts' rows on disk: made once, whole or not at all, by any number of processes."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import flashgrpo.models.conditions
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.models.conditions import Conditions, fingerprint
from flashgrpo.models.load import load_model
from flashgrpo.types import Condition, Prompt
from flashgrpo.video import image_bytes, open_image
from tests.families import KINDS

PROMPTS = [Prompt(f"prompt {n}", {}) for n in range(12)]


class Encoder:
    """Gives each text a row and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        self.asked.append(prompt.text)
        row = torch.zeros(1, 16, 4)
        row[0, :3] = float(len(prompt.text)) + torch.arange(3)[:, None]
        return {"text": row, "mask": (torch.arange(16) < 3).long()[None]}


def test_a_prompt_is_encoded_once_for_all_processes_to_come(tmp_path):
    first, second = Encoder(), Encoder()
    rows = Conditions(tmp_path, first)([PROMPTS[0], PROMPTS[10], PROMPTS[0]]).tensors
    again = Conditions(tmp_path, second)([PROMPTS[0], PROMPTS[10], PROMPTS[0]]).tensors
    assert first.asked == ["prompt 0", "prompt 10"]
    assert second.asked == []
    for name in ("text", "mask"):
        assert torch.equal(rows[name], again[name])
        assert rows[name].dtype == again[name].dtype
    assert rows["text"].shape == (3, 16, 4)
    assert torch.equal(rows["text"], torch.cat([Encoder()(PROMPTS[n])["text"] for n in (0, 10, 0)]))


def test_a_prompt_of_many_samples_travels_once(monkeypatch):
    sent, to = [], Condition.to

    def noted(rows: Condition, device: torch.device) -> Condition:
        sent.append(len(rows.tensors["text"]))
        return to(rows, device)

    monkeypatch.setattr(Condition, "to", noted)
    order = [3, 10, 3, 3, 10]
    rows = Conditions(None, Encoder())([PROMPTS[n] for n in order], torch.device("cpu"))
    assert sent == [2]
    assert torch.equal(rows.tensors["text"], torch.cat([Encoder()(PROMPTS[n])["text"] for n in order]))


def test_padding_takes_no_room(tmp_path):
    Conditions(tmp_path, Encoder())(PROMPTS[:1])
    [file] = tmp_path.rglob("*.safetensors")
    assert file.stat().st_size < 3 * 4 * 4 + 3 * 8 + 300


def test_a_damaged_entry_is_made_anew(tmp_path):
    Conditions(tmp_path, Encoder())(PROMPTS[:2])
    whole, cut = sorted(tmp_path.rglob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-7])
    encoder = Encoder()
    conditions = Conditions(tmp_path, encoder)
    assert len(conditions.missing(PROMPTS[:2])) == 1
    conditions.fill(PROMPTS[:2])
    assert len(encoder.asked) == 1
    assert not conditions.missing(PROMPTS[:2])
    assert whole.exists()
    assert not list(tmp_path.rglob(".partial*"))


def test_processes_share_the_work(tmp_path):
    """Each begins at a place of its own and leaves out what it finds there."""
    encoders = [Encoder(), Encoder()]
    gate = threading.Barrier(2)

    def fill(rank: int) -> None:
        def compute(prompt: Prompt) -> dict[str, torch.Tensor]:
            if len(encoders[rank].asked) < 5:
                gate.wait(timeout=20)  # in step; at the end both may make the last row, which does no harm
            return encoders[rank](prompt)

        Conditions(tmp_path, compute).fill(PROMPTS, begin=rank / 2)

    threads = [threading.Thread(target=fill, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [encoder.asked for encoder in encoders]
    assert set(asked[0] + asked[1]) == {prompt.text for prompt in PROMPTS}
    assert not set(asked[0][:5]) & set(asked[1][:5])
    assert len(asked[0] + asked[1]) <= len(PROMPTS) + 2


def test_ranks_of_a_machine_look_at_a_part_each(tmp_path, monkeypatch):
    """To open every entry on every rank is what a shared disk answers slowest."""
    Conditions(tmp_path, Encoder()).fill(PROMPTS)
    sorted(tmp_path.rglob("*.safetensors"))[3].unlink()
    opened, real = [], flashgrpo.models.conditions.safe_open
    monkeypatch.setattr(
        flashgrpo.models.conditions, "safe_open", lambda file, **kind: opened.append(file) or real(file, **kind)
    )
    conditions, encoder = Conditions(tmp_path, Encoder()), Encoder()
    twice = [*PROMPTS, *PROMPTS[:3]]
    found = {number for part in range(4) for number in conditions.missing(twice, part, 4)}
    assert len(opened) == len(PROMPTS)  # by all parts together
    assert found
    opened.clear()
    Conditions(tmp_path, encoder).fill([twice[number] for number in sorted(found)])
    assert len(opened) == len(found) <= 2
    assert len(encoder.asked) == 1
    assert not conditions.missing(twice)


def test_memory_holds_the_last_rows_only(tmp_path):
    encoder = Encoder()
    conditions = Conditions(None, encoder, keep=2 * (3 * 4 * 4 + 3 * 8))  # bytes of two rows
    for number in (0, 1, 0, 2, 0, 1):
        conditions([PROMPTS[number]])
    assert encoder.asked == ["prompt 0", "prompt 1", "prompt 2", "prompt 1"]


def test_images_count_where_the_model_looks_at_them(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    pair = [Prompt("one text", {"image": str(tmp_path / f"{name}.png")}) for name in ("a", "b")]
    for columns, asked in ((("image",), 2), (("last_image",), 1), ((), 1)):
        encoder = Encoder()
        Conditions(tmp_path / f"of {columns}", encoder, images=columns)(pair)
        assert len(encoder.asked) == asked


def test_other_encoders_and_settings_have_other_entries(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    weights = tmp_path / "text_encoder/model.safetensors"
    weights.write_bytes(bytes(5 * 2**20))
    before = fingerprint(tmp_path, ["text_encoder"], {"length": 1})
    assert before == fingerprint(tmp_path, ["text_encoder", "not_there"], {"length": 1})
    assert before != fingerprint(tmp_path, ["text_encoder"], {"length": 2})
    content = bytearray(weights.read_bytes())
    content[-1] = 1
    weights.write_bytes(content)
    assert before != fingerprint(tmp_path, ["text_encoder"], {"length": 1})


def test_what_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("")
    for mode, color in (("P", 0), ("L", 0)):  # pictures in memory, told apart by size and pixels
        wide, high = Image.new(mode, (8, 2), color), Image.new(mode, (2, 8), color)
        assert image_bytes(wide) != image_bytes(high)
    with pytest.raises(UserError, match="cannot write"):
        Conditions(tmp_path / "file/below", Encoder()).fill(PROMPTS[:1])
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    for image in (str(tmp_path / "no.png"), str(Path(tmp_path) / "gone.png")):
        with pytest.raises(UserError, match="cannot be read"):
            open_image(image)


def test_pipelines_with_one_encoder_share_no_rows(tmp_path):
    """Sana's of images and of videos read the same weights, and put other instructions before a text."""
    folders = set()
    for name in ("sana", "sana-video"):
        KINDS[name].build().save_pretrained(tmp_path / name)
        folders.add(load_model(KINDS[name].config(tmp_path / name), single_process(), 0)._cache_folder())
    assert len(folders) == 2
