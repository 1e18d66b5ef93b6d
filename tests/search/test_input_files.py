"""Inputs: what a file or a mapping makes of one, what tells it from others, and the one line for a mistake."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsparse.search.errors import BadInput
from diffsparse.search.inputs import Input, as_input, as_inputs, contents, read_inputs
from diffsparse.search.media import Media
from tests.search.conditioned import picture, write_files
from tests.search.tiny import Cli


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_files(folder)
    return folder


def written(folder: Path, *lines: str, name: str = "inputs.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


# -- what becomes of a file --------------------------------------------------------------------------------------------


def test_a_text_file_is_prompts_as_before(tmp_path: Path) -> None:
    file = written(tmp_path, "# a comment", "one", "", "two", "one", name="prompts.txt")
    inputs = read_inputs(file)
    assert [one.name for one in inputs] == ["one", "two"] and all(one.is_plain for one in inputs)
    assert contents(inputs) == ["one", "two"]


def test_plain_prompts_have_the_hashes_that_they_had() -> None:
    """A record of before inputs were more than prompts stays valid."""
    found = hashlib.sha256(json.dumps(contents(as_inputs(["a red circle", "a blue square"]))).encode()).hexdigest()
    assert found == hashlib.sha256(b'["a red circle", "a blue square"]').hexdigest()
    assert contents([as_input({"prompt": "a"})]) == contents([as_input("a")]) == ["a"]


@pytest.mark.parametrize("name", ["inputs.jsonl", "inputs.txt", "inputs.NDJSON"])
def test_json_lines_by_their_ending_or_their_first_brace(files: Path, name: str) -> None:
    lines = ["# comment", "", '{"prompt": "a", "image": "picture0.png", "strength": 0.5}', '{"prompt": "b"}']
    first, second = read_inputs(written(files, *lines, name=name))
    assert first.name == "a [image: picture0.png, strength: 0.5]" and second.is_plain
    image = first.arguments["image"]
    assert isinstance(image, Media) and Path(image.source) == files / "picture0.png" and not image.is_clip
    assert first.load(object())["image"].size == (144, 112)
    assert np.array_equal(first.load(object())["image"], picture(0))


def test_clips_lists_and_conditions(files: Path) -> None:
    given = {
        "prompt": "a", "video": "clip0.gif", "mask": ["mask0.png", "mask1.png"], "control_video": ["picture0.png"],
        "conditions": [{"image": "picture1.png", "strength": 0.5}, {"video": "clip1.gif"}], "prompt_2": "not.png",
    }  # fmt: skip
    loaded = as_input(given, files).load(object())
    assert len(loaded["video"]) == 9 and all(f.mode == "RGB" for f in loaded["video"])
    assert [m.size for m in loaded["mask"]] == [(144, 112)] * 2 and len(loaded["control_video"]) == 1
    assert loaded["conditions"][0]["strength"] == 0.5 and len(loaded["conditions"][1]["video"]) == 9
    assert loaded["prompt_2"] == "not.png"


def test_values_in_memory_stay_as_they_are() -> None:
    image, embeds = picture(0), torch.ones(1, 2, 3)
    one = as_input({"prompt": None, "image": image, "prompt_embeds": embeds, "ip_adapter_image": [image]})
    loaded = one.load(object())
    assert loaded["image"] is image and loaded["prompt_embeds"] is embeds and loaded["ip_adapter_image"] == [image]
    assert as_input(one) is one


# -- what tells inputs apart -------------------------------------------------------------------------------------------


def test_files_count_by_their_content(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    picture(1).save(tmp_path / "c.png")
    a, b, c = (as_input({"prompt": "p", "image": f"{name}.png"}, tmp_path).content for name in "abc")
    assert a == b != c
    assert str(tmp_path) not in json.dumps(a)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"image": picture(0)}, {"image": picture(1)}),
        ({"image": picture(0)}, {"image": picture(0).resize((72, 56))}),
        ({"prompt_embeds": torch.zeros(2, 3)}, {"prompt_embeds": torch.zeros(3, 2)}),
        ({"prompt_embeds": torch.ones(2).bfloat16()}, {"prompt_embeds": torch.zeros(2).bfloat16()}),
        ({"image": np.zeros((4, 4, 3))}, {"image": np.ones((4, 4, 3))}),
        ({"strength": 0.5}, {"strength": 0.6}),
        ({"clip_skip": None}, {}),
    ],
)
def test_what_differs_is_told_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = as_inputs([{"prompt": "p", **one}, {"prompt": "p", **other}, {"prompt": "p", **one}])
    assert len(found) == 2 and len({x.name for x in found}) == 2


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(BadInput, match="an input holds a object, which cannot be told from another one"):
        as_inputs([{"prompt": "p", "attention_kwargs": object()}])


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "no valid JSON (Expecting ',' delimiter at column 15)"),
        ('["a"]', 'an input is a JSON object, {"prompt": "..."}, got a'),
        ('"a"', 'an input is a JSON object, {"prompt": "..."}, got a'),
        ("{}", "an input without arguments; give at least a prompt"),
        ('{"prompt": "a", "prompt": "b"}', "prompt stands twice; leave one out"),
        ('{"prompt": "a", "strength": NaN}', "NaN is no number that an argument can be"),
        ('{"prompt": "a", "image": "none.png"}', "no file at 'none.png'; a path is relative to the file that names it"),
        ('{"prompt": "a", "image": "notes.txt"}', "'notes.txt' is no picture that can be read; give a PNG"),
        ('{"prompt": "a", "image": "cut.png"}', "'cut.png' is no picture that can be read"),
        ('{"prompt": "a", "image": "clip0.gif"}', "image takes a picture, and 'clip0.gif' is a clip"),
        ('{"prompt": "a", "image": ["clip0.gif"]}', "image takes pictures, and 'clip0.gif' is a clip"),
        ('{"prompt": "a", "video": "picture0.png"}', "video takes a clip, and 'picture0.png' does not end as one"),
        ('{"prompt": "a", "video": "broken.gif"}', "'broken.gif' is no clip that can be read"),
        ('{"prompt": "a", "video": "broken.mp4"}', "'broken.mp4'"),
        ('{"prompt": "a", "conditions": [{"image": "none.png"}]}', "no file at 'none.png'"),
        ('{"prompt": "a", "height": 480}', "height cannot be given for one input: it is the same for all inputs"),
        ('{"prompt": "a", "num_inference_steps": 8}', "--steps, or num_inference_steps="),
        ('{"prompt": "a", "guidance_scale": 8}', "--guidance-scale, or guidance_scale="),
        ('{"prompt": "a", "generator": 1}', "generator cannot be given for one input: the noise comes from the seed"),
        ('{"prompt": "a", "num_videos_per_prompt": 2}', "each input makes one clip"),
    ],
)
def test_one_line_with_the_file_and_the_line(cli: Cli, files: Path, tmp_path: Path, line: str, message: str) -> None:
    (files / "notes.txt").write_text("no picture")
    (files / "cut.png").write_bytes((files / "picture0.png").read_bytes()[:60])
    for name in ("broken.gif", "broken.mp4"):
        (files / name).write_bytes(b"no clip")
    file = written(files, '{"prompt": "first"}', line)
    code, out, err = cli("search", "no/model", "--prompts", file, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {str(file)!r}, line 2: ") and message in err
    assert not (tmp_path / "out").exists()


def test_files_without_inputs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no input; write one JSON object a line"):
        read_inputs(written(tmp_path, "# nothing"))
    with pytest.raises(BadInput, match="no prompts file at"):
        read_inputs(tmp_path / "none.jsonl")


def test_inputs_from_python_that_are_none() -> None:
    for value in ("a prompt", {"prompt": "a"}, Input("a", {"prompt": "a"})):
        with pytest.raises(BadInput, match="inputs are a list, got one by itself"):
            as_inputs(value)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="an input is a prompt or arguments by name, got 3"):
        as_inputs([3])  # type: ignore[list-item]


def test_an_address_is_fetched_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load_image(source: str) -> Any:
        asked.append(source)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr("diffusers.utils.load_image", load_image)
    one = as_input({"prompt": "a", "image": "https://example.com/cat.png"})
    assert not asked and one.load(object())["image"].size == (4, 4) and asked == ["https://example.com/cat.png"]
