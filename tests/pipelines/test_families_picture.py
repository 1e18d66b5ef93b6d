"""Image models: batches and conditions that change the sequence, and those that must run dense."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffsparse.grid import TokenGrid
from diffsparse.pipelines import (
    AttentionCall,
    UnsupportedModelError,
    enable_sparse_attention,
    find_transformers,
    sparse_attention,
    sparse_attention_summary,
    tap_attention,
)
from diffsparse.pipelines.families.unsuitable_image import UNSUITABLE
from diffsparse.pipelines.summary import TransformerSummary
from tests.pipelines.case import Inputs, Shape
from tests.pipelines.models import CASES, masked_attention, mixed_plan, run
from tests.pipelines.zoo_picture import (
    cogview4,
    cogview_inputs,
    ernie_image,
    ernie_image_inputs,
    glm_image,
    glm_image_inputs,
    hidream,
    hidream_inputs,
    hunyuan_dit,
    hunyuan_dit_inputs,
    ideogram4,
    ideogram4_image,
    ideogram4_inputs,
    joyimage_edit,
    joyimage_edit_inputs,
    joyimage_edit_plus,
    joyimage_edit_plus_inputs,
    krea2,
    krea2_inputs,
    lumina2,
    lumina2_inputs,
    pixart,
    pixart_inputs,
    z_image,
    z_image_inputs,
    z_image_stacked,
)
from tests.tolerance import MODEL, assert_near

SHAPE = (1, 13, 16)


def summary(model: torch.nn.Module) -> TransformerSummary:
    return sparse_attention_summary(model).transformers["transformer"]


def check_sparse(model: torch.nn.Module, inputs: Inputs, grid: TokenGrid, **special: TokenGrid) -> list[AttentionCall]:
    """A plan gives what its masks mean, all calls are sparse and on these grids; ``special``: of some layers."""
    plan = mixed_plan(model)
    calls: list[AttentionCall] = []
    masked = masked_attention(plan)

    def tap(call: AttentionCall) -> torch.Tensor | None:
        calls.append(call)
        return masked(call)

    dense = run(model, inputs)
    with tap_attention(model, tap):
        expected = run(model, inputs)
    for call in calls:
        assert call.grid == special.get(call.layer.split(".")[0], grid)
    with sparse_attention(model, plan):
        assert_near(run(model, inputs), expected, MODEL)
        assert summary(model).dense_calls == 0 and summary(model).sparse_calls == len(calls) > 0
    assert (expected - dense).abs().max() > 1e-3
    return calls


def check_dense(model: torch.nn.Module, inputs: Inputs, reason: str) -> None:
    """The plan changes nothing, and the summary says why."""
    dense = run(model, inputs)
    with sparse_attention(model, mixed_plan(model)):
        found = run(model, inputs)
        assert summary(model).sparse_calls == 0
        assert len(summary(model).dense_reasons) == 1
        assert reason in next(iter(summary(model).dense_reasons))
        assert all(layer.dense_calls and not layer.unseen_calls for layer in summary(model).layers)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("shape", [(1, 14, 16), (1, 13, 16)])
def test_z_image_captions_of_unequal_length(shape: Shape) -> None:
    """They are padded at the end of the sequence, to 64 tokens here; the image to a multiple of 32."""
    padding = -shape[1] * shape[2] % 32
    inputs = z_image_inputs(*shape, captions=(7, 40))
    grid = TokenGrid(*shape, text_after=padding + 64)
    alone = TokenGrid(*shape, text_after=padding)
    calls = check_sparse(z_image_stacked(), inputs, grid, noise_refiner=alone)
    for call in calls:
        if call.layer.startswith("noise_refiner"):
            assert call.kv_len is None
        else:
            assert call.kv_len is not None
            assert call.kv_len.sum(1).tolist() == [call.q.shape[1] - 32, call.q.shape[1]]


def test_z_image_padding_of_the_image() -> None:
    inputs = z_image_inputs(*SHAPE)
    padded = TokenGrid(*SHAPE, text_after=16)
    check_sparse(z_image_stacked(), inputs, TokenGrid(*SHAPE, text_after=48), noise_refiner=padded)


def test_z_image_with_images_of_several_sizes() -> None:
    inputs = z_image_inputs(1, 14, 16)
    inputs["x"][1] = torch.randn(4, 1, 20, 24)
    check_dense(z_image(), inputs, "the images of the batch have different sizes")


def test_z_image_omni() -> None:
    inputs = z_image_inputs(1, 14, 16)
    inputs["x"] = [[torch.randn(4, 1, 8, 8), image] for image in inputs["x"]]
    inputs["cap_feats"] = [[caption, caption] for caption in inputs["cap_feats"]]
    inputs["siglip_feats"] = [None, None]
    inputs["image_noise_mask"] = [[0, 1], [0, 1]]
    check_dense(z_image(), inputs, "omni mode")


def test_lumina2_captions_of_unequal_length() -> None:
    check_dense(lumina2(), lumina2_inputs(*SHAPE, captions=(7, 4)), "captions of different lengths")


@pytest.mark.parametrize("captions", [(12,), (1, 1)])
def test_lumina2_caption_without_padding_and_nearly_empty(captions: tuple[int, ...]) -> None:
    inputs = lumina2_inputs(*SHAPE, captions=captions)
    grid = TokenGrid(*SHAPE, text_before=captions[0])
    check_sparse(lumina2(), inputs, grid, noise_refiner=TokenGrid(*SHAPE))


def test_hidream_square_has_no_padding() -> None:
    check_sparse(hidream(), hidream_inputs(1, 14, 14), TokenGrid(1, 14, 14, text_after=17))


def test_hidream_packed_images() -> None:
    inputs = hidream_inputs(*SHAPE)
    mask = torch.ones(2, 208)
    mask[1, 200:] = 0
    inputs["hidden_states"] = torch.randn(2, 208, 16)
    inputs["hidden_states_masks"] = mask
    inputs["img_ids"] = torch.zeros(2, 208, 3)
    inputs["img_sizes"] = [(13, 16), (13, 16)]
    check_dense(hidream(), inputs, "packed")


def test_a_text_mask_that_cogview_adds_to_the_logits() -> None:
    for build, make in ((cogview4, cogview_inputs), (glm_image, glm_image_inputs)):
        inputs = make(*SHAPE)
        inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        check_dense(build(), inputs, "a mask that is not a key-padding mask")


def test_a_mask_over_the_image_of_pixart() -> None:
    inputs = pixart_inputs(*SHAPE)
    inputs["attention_mask"] = torch.ones(2, 208)
    check_dense(pixart(), inputs, "a mask that is not a key-padding mask")


def test_glm_image_with_reference_images() -> None:
    """Their keys are kept in one forward, and read in those of the image."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    model = glm_image()
    caches = GlmImageKVCache(2)
    inputs = {**glm_image_inputs(*SHAPE), "kv_caches": caches}
    check_sparse(model, inputs, TokenGrid(*SHAPE, text_before=7))  # text to image: no mode

    reference = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in glm_image_inputs(1, 4, 5).items()}
    reference.update(encoder_hidden_states=torch.zeros(1, 0, 16), kv_caches=caches)
    caches.set_mode("write")
    check_dense(model, reference, "keys of a reference image are being kept")
    caches.set_mode("read")
    check_dense(model, inputs, "kept keys of reference images")
    caches.set_mode("skip")
    check_sparse(model, inputs, TokenGrid(*SHAPE, text_before=7))


def test_perturbed_guidance_leaves_a_smaller_batch() -> None:
    """Two of three items get attention, of the third the layer takes the values alone."""
    from diffusers.models.attention_processor import PAGCFGHunyuanAttnProcessor2_0

    model = hunyuan_dit()
    model.blocks[1].attn1.processor = PAGCFGHunyuanAttnProcessor2_0()
    inputs = hunyuan_dit_inputs(*SHAPE)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = torch.cat([value, value[1:]])
    calls = check_sparse(model, inputs, TokenGrid(*SHAPE))
    assert [call.q.shape[0] for call in calls] == [3, 2, 3, 3]


def test_krea2_without_a_mask_and_with_other_positions() -> None:
    model = krea2()
    inputs = krea2_inputs(*SHAPE)
    inputs["encoder_attention_mask"] = None
    check_sparse(model, inputs, TokenGrid(*SHAPE, text_before=7))
    inputs["position_ids"][100:, 1] += 5  # a hole in the image
    check_dense(model, inputs, "image tokens are not one image")
    inputs["position_ids"] = torch.zeros(215, 3)[:-1]
    enable_sparse_attention(model, mixed_plan(model))
    with pytest.raises(RuntimeError):  # the model's own error, no other
        run(model, inputs)


def test_ideogram4_without_text() -> None:
    """The twin for guidance: all tokens are of the image, and no mask reaches attention."""
    inputs = ideogram4_inputs(*SHAPE, text=(0, 0), room=0)
    calls = check_sparse(ideogram4(), inputs, TokenGrid(*SHAPE))
    assert all(call.kv_len is None for call in calls)


def test_ideogram4_padding_in_front_is_no_key() -> None:
    calls = check_sparse(ideogram4_image(), ideogram4_inputs(*SHAPE), TokenGrid(*SHAPE, text_before=7))
    for call in calls:
        assert call.kv_len is not None and call.kv_len[0].all()
        assert call.kv_len[1].nonzero()[0] == 3 and call.kv_len[1, 3:].all()


def test_ideogram4_several_samples_in_one_sequence() -> None:
    inputs = ideogram4_inputs(*SHAPE)
    inputs["segment_ids"][0, :3] = 2
    check_dense(ideogram4(), inputs, "several samples in one sequence")
    inputs = ideogram4_inputs(*SHAPE)
    for name in ("position_ids", "segment_ids", "indicator"):
        inputs[name] = inputs[name].flip(1)  # the image first
    check_dense(ideogram4(), inputs, "images that are not at the end")


def test_ernie_image_without_text() -> None:
    inputs = ernie_image_inputs(*SHAPE)
    inputs["text_bth"] = torch.zeros(2, 0, 48)
    inputs["text_lens"] = torch.tensor([0, 0])
    check_dense(
        ernie_image(), inputs, "a key mask over visual tokens"
    )  # it always passes a mask, and values are not read


def test_joyimage_without_references() -> None:
    inputs = joyimage_edit_inputs(1, 13, 16)
    check_sparse(joyimage_edit(), inputs, TokenGrid(1, 13, 16, text_after=7))
    inputs["hidden_states"] = inputs["hidden_states"][:, 0]
    check_sparse(joyimage_edit(), inputs, TokenGrid(1, 13, 16, text_after=7))


def test_joyimage_references() -> None:
    """Of the image's size they are frames of one video; other ones, or other ones from item to item, are text."""
    model = joyimage_edit_plus()
    for references, grid in (
        (((SHAPE,), (SHAPE,)), TokenGrid(2, 13, 16, text_after=7)),
        (((SHAPE, (1, 5, 6)),) * 2, TokenGrid(2, 13, 16, text_after=37)),
        (((SHAPE,), ((1, 5, 6),)), TokenGrid(1, 13, 16, text_after=215)),
        (((), ()), TokenGrid(1, 13, 16, text_after=7)),
    ):
        check_sparse(model, joyimage_edit_plus_inputs(*SHAPE, references=references), grid)
    inputs = joyimage_edit_plus_inputs(*SHAPE)
    inputs["shape_list"][1][0] = (1, 16, 13)
    check_dense(model, inputs, "the images of the batch have different sizes")


@pytest.mark.parametrize("name", UNSUITABLE)
def test_unsuitable_models_say_why(name: str) -> None:
    model = torch.nn.Module()
    model.__class__ = type(name, (torch.nn.Module,), {})
    assert hasattr(diffusers, name) or hasattr(diffusers.models.transformers, name)
    with pytest.raises(UnsupportedModelError, match=f"{name} is not suited: {UNSUITABLE[name][:30]}"):
        find_transformers(model)


@pytest.mark.slow(reason="compiles a model")
@pytest.mark.parametrize("name", ["z_image", "ideogram4"])
def test_compiled_layers_that_see_other_grids_and_masks(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    model = case.build()
    inputs = case.inputs(*SHAPE)
    plan = mixed_plan(model)
    with sparse_attention(model, plan):
        sparse = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    enable_sparse_attention(model, plan)
    assert_near(run(model, inputs), sparse, MODEL)
    assert summary(model).sparse_calls == len(case.layers) and summary(model).dense_calls == 0
    torch._dynamo.reset()
