"""Vision transformer: names, numbers of timm's, position embedding, files, and the form to export."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgead.errors import TrainingError, WeightsError
from edgead.models import vit as module
from edgead.models.files import save_safetensors
from edgead.models.folding import IMAGENET_MEAN, normalise
from edgead.models.vit import CONFIGS, REGISTERS, MergedViT, ViT, ViTConfig, from_timm, load_vit

GOLDEN = Path(__file__).parent / "golden" / "vit_small_patch14_reg4_dinov2.npz"
TINY = ViTConfig(dim=32, heads=2, depth=3, grid=5)
TINY_PX = 56
TINY_TAPS = (1, 2)
# Parameters of timm's vit_{small,base}_patch14_reg4_dinov2, plus the class token's position.
PARAMETERS = {"s": 22_057_728, "b": 86_582_784}
# Written down from the published layout.
SHAPES = {
    "cls_token": (1, 1, 384),
    "pos_embed": (1, 1370, 384),
    "register_tokens": (1, 4, 384),
    "patch_embed.proj.weight": (384, 3, 14, 14),
    "patch_embed.proj.bias": (384,),
    "blocks.0.norm1.weight": (384,),
    "blocks.3.attn.qkv.weight": (1152, 384),
    "blocks.3.attn.qkv.bias": (1152,),
    "blocks.5.attn.proj.weight": (384, 384),
    "blocks.5.ls1.gamma": (384,),
    "blocks.7.norm2.bias": (384,),
    "blocks.11.mlp.fc1.weight": (1536, 384),
    "blocks.11.mlp.fc2.weight": (384, 1536),
    "blocks.11.mlp.fc2.bias": (384,),
    "blocks.11.ls2.gamma": (384,),
    "norm.weight": (384,),
    "norm.bias": (384,),
}


def draw(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    """Values uniform in +-scale that depend on the name alone, the same on every machine."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape))) >> np.uint64(40)
    values = (raw / 2**23 - 1).astype(np.float32) * np.float32(scale)
    return torch.from_numpy(values).reshape(shape)


def drawn_state(config: ViTConfig) -> dict[str, Tensor]:
    """Weights in the published layout with which every part of the network has a say."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in ViT(config).state_dict().items()}
    state = {"mask_token": torch.zeros(1, config.dim)}
    for key, shape in shapes.items():
        if "norm" in key and key.endswith("weight"):
            state[key] = 1 + draw(key, shape, 0.5)
        elif key.endswith("gamma"):
            state[key] = 0.3 + draw(key, shape, 0.15)
        elif key.endswith("bias"):
            state[key] = draw(key, shape, 0.1)
        elif key.endswith("weight"):
            state[key] = draw(key, shape, (3 / np.prod(shape[1:])) ** 0.5)
        else:
            state[key] = draw(key, shape, 1.0)  # tokens and positions
    return state


def filled(config: ViTConfig) -> ViT:
    state = drawn_state(config)
    del state["mask_token"]
    network = ViT(config)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def timm_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What timm makes of a published file."""
    state = dict(state)
    del state["mask_token"]
    position = state.pop("pos_embed")
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + position[:, :1]
    state["pos_embed"] = position[:, 1:]
    return state


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.fixture(scope="module")
def small() -> ViT:
    return filled(CONFIGS["s"])


@pytest.fixture
def tiny() -> ViT:
    network = filled(TINY)
    network.for_size(TINY_PX)
    return network


@pytest.fixture
def images() -> Tensor:
    """RGB 0..255, float32 [3, 3, 56, 56]."""
    return (127.5 * (1 + draw("images", (3, 3, TINY_PX, TINY_PX), 1.0))).round()


@pytest.fixture
def known_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CONFIGS, "tiny", TINY)


@pytest.mark.parametrize("size", ["s", "b"])
def test_names_and_shapes_are_the_published_ones(size: str) -> None:
    with torch.device("meta"):
        network = ViT(CONFIGS[size])
    state = network.state_dict()
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[size]
    assert len(state) == 175
    factor = CONFIGS[size].dim // 384
    widened = {
        key: tuple(side if side in (1, 3, 4, 14, 1370) else side * factor for side in shape)
        for key, shape in SHAPES.items()
    }
    assert {key: tuple(state[key].shape) for key in SHAPES} == widened


@pytest.mark.parametrize("side_px", [70, 98])
@torch.inference_mode()
def test_numbers_are_timms(small: ViT, side_px: int) -> None:
    """Against maps of timm 1.0.31 with the weights of `drawn_state`, every 16th channel.

    Made with torch 2.13 on a CPU, where the difference is 0; another order of summation costs 1e-5.
    """
    golden = np.load(GOLDEN)
    small.for_size(side_px)
    found = small.features(draw("x", (1, 3, side_px, side_px), 2.0))
    for tap, value in zip((7, 11), found, strict=True):
        expected = torch.from_numpy(golden[f"block{tap}_{side_px}px"])
        assert value.shape == (1, 384, side_px // 14, side_px // 14) and value.dtype == torch.float32
        torch.testing.assert_close(value[:, ::16], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side_px", [70, 98])
@torch.inference_mode()
def test_numbers_are_those_of_the_timm_that_is_installed(small: ViT, side_px: int) -> None:
    reason = "timm (and the torchvision that it imports) is not installed"
    timm = pytest.importorskip("timm", reason=reason, exc_type=ImportError)
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=side_px).eval()
    theirs.load_state_dict(checkpoint_filter_fn(drawn_state(CONFIGS["s"]), theirs))
    x = draw("x", (1, 3, side_px, side_px), 2.0)
    expected = theirs.forward_intermediates(x, indices=[7, 11], norm=True, intermediates_only=True)
    small.for_size(side_px)
    for value, reference in zip(small.features(x), expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)

    # And back: the weights as timm holds them.
    ours = ViT(ViTConfig(384, 6, grid=side_px // 14)).eval()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    ours.for_size(side_px)
    for value, reference in zip(ours.features(x), expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_block_is_what_the_paper_writes(tiny: ViT) -> None:
    """Literally and in FP64: x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x))."""
    block = tiny.blocks[0]
    state = {key: value.double() for key, value in block.state_dict().items()}
    x = draw("tokens", (1, 9, TINY.dim), 0.003)  # so small that the 1e-6 in the norm counts

    def norm(y: Tensor, name: str) -> Tensor:
        deviation = y - y.mean(-1, keepdim=True)
        scaled = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    y = x.double()
    q, k, v = linear(norm(y, "norm1"), "attn.qkv").chunk(3, -1)
    heads = []
    for head in range(TINY.heads):
        part = slice(head * TINY.dim // TINY.heads, (head + 1) * TINY.dim // TINY.heads)
        scores = q[0, :, part] @ k[0, :, part].T / (TINY.dim // TINY.heads) ** 0.5
        heads.append((scores - scores.max()).exp() / (scores - scores.max()).exp().sum(1, keepdim=True)
                     @ v[0, :, part])  # fmt: skip
    y = y + state["ls1.gamma"] * linear(torch.cat(heads, 1), "attn.proj")
    hidden = linear(norm(y, "norm2"), "mlp.fc1")
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    y = y + state["ls2.gamma"] * linear(gelu, "mlp.fc2")
    torch.testing.assert_close(block(x).double(), y, atol=1e-5, rtol=1e-5)  # FP32 against FP64


@torch.inference_mode()
def test_blocks_after_the_last_tap_do_not_run(tiny: ViT, images: Tensor) -> None:
    x = normalise(images)
    first, last = tiny.features(x, (0, 2))
    assert first.shape == last.shape == (3, 32, 4, 4)
    assert torch.equal(tiny.features(x, (2, 0))[0], last)
    for network in (tiny.blocks[1], tiny.blocks[2]):
        network.norm1.weight.fill_(torch.nan)
    assert torch.equal(tiny.features(x, (0,))[0], first)
    assert torch.isnan(tiny.features(x, (1,))[0]).all()
    assert len(tiny.merged(torch.float32, (0,)).blocks) == 1


@torch.inference_mode()
def test_the_final_norm_is_on_every_tap_and_no_token_before_the_patches_is_left(tiny: ViT) -> None:
    """A norm with gain 0 makes every patch of both taps its bias."""
    tiny.norm.weight.zero_()
    for value in tiny.features(torch.zeros(2, 3, TINY_PX, TINY_PX), TINY_TAPS):
        assert torch.equal(value, tiny.norm.bias.view(1, -1, 1, 1).expand(2, -1, 4, 4))


def test_the_position_embedding_at_the_size_of_the_file_stays_as_it_is() -> None:
    network = filled(TINY)
    network.for_size(TINY.grid * 14)
    assert torch.equal(network.positions, network.pos_embed[:, 1:])
    assert "positions" not in network.state_dict()


@pytest.mark.parametrize("cells", [2, 4, 6, 10])
def test_the_position_embedding_is_resampled_as_images_are(cells: int) -> None:
    """Pillow's bicubic resize is antialiased and has no offset: another program with the same rule."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    network = filled(TINY)
    network.for_size(cells * 14)
    assert network.positions.shape == (1, cells**2, TINY.dim)
    trained = network.pos_embed[0, 1:].reshape(TINY.grid, TINY.grid, TINY.dim)
    for channel in (0, 17):
        picture = image.fromarray(np.ascontiguousarray(trained[..., channel].detach()))
        expected = np.asarray(picture.resize((cells, cells), image.Resampling.BICUBIC))
        found = network.positions[0, :, channel].reshape(cells, cells)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@given(st.integers(-30, 1100))
def test_sizes_that_are_no_multiple_of_14_are_refused_with_the_nearest_ones(side_px: int) -> None:
    network = ViT(ViTConfig(dim=2, heads=1, depth=0, grid=3))
    if side_px > 0 and side_px % 14 == 0:
        network.for_size(side_px)
        assert network.positions.shape == (1, (side_px // 14) ** 2, 2)
        return
    with pytest.raises(TrainingError, match=f"images of {side_px} px .* patches of 14 px") as error:
        network.for_size(side_px)
    nearest = [int(word) for word in str(error.value).split("take ")[1].split(" or ")]
    expected = [n for n in range(14, 1200, 14) if abs(n - side_px) < 14] or [14]
    assert nearest == expected


def test_what_a_caller_forgot_is_said(tiny: ViT) -> None:
    x = torch.zeros(1, 3, 70, 70)
    with pytest.raises(ValueError, match="call for_size"):
        filled(TINY).features(x, TINY_TAPS)
    with pytest.raises(ValueError, match="call for_size"):
        filled(TINY).merged(torch.float32, TINY_TAPS)
    with pytest.raises(ValueError, match=r"\(1, 3, 70, 70\), expected a side of 56 px"):
        tiny.features(x, TINY_TAPS)
    with pytest.raises(ValueError, match=r"taps \(7, 11\), expected blocks from 0 to 2"):
        tiny.features(x)


@pytest.mark.usefixtures("known_tiny")
@torch.inference_mode()
def test_both_layouts_give_the_same_network(tmp_path: Path, images: Tensor) -> None:
    state = drawn_state(TINY)
    torch.save(state, tmp_path / "official.pth")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pth")
    save_safetensors(tmp_path / "timm.safetensors", timm_layout(state), {"origin": "timm"})
    expected = filled(TINY)
    expected.for_size(TINY_PX)
    for name in ("official.pth", "wrapped.pth", "timm.safetensors"):
        network, info = load_vit(tmp_path / name)
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert info.layout == f"dinov2_vittiny14_reg ({'timm' if 'timm' in name else 'official'} keys)"
        assert info.name == name and len(info.sha256) == 64
        assert info.metadata == ({"origin": "timm"} if "timm" in name else {})
        network.for_size(TINY_PX)
        for found, value in zip(
            *(n.features(images, TINY_TAPS) for n in (network, expected)), strict=True
        ):
            assert torch.equal(found, value), name


def test_the_size_is_told_by_the_file(tmp_path: Path, small: ViT) -> None:
    path = tmp_path / "s.safetensors"
    save_safetensors(path, {k: v.half() for k, v in small.state_dict().items()}, {})
    network, info = load_vit(path)
    assert network.config == CONFIGS["s"] and info.layout == "dinov2_vits14_reg (official keys)"


def broken_files() -> Iterator[tuple[str, dict[str, Tensor], str]]:
    state = drawn_state(TINY)
    plain = {k: v for k, v in state.items() if k != "register_tokens"}
    yield "without registers", plain, "without register tokens.*dinov2_vits14_reg4_pretrain.pth"
    wide = {k: v.repeat(1, 1, 2) if k == "pos_embed" else v for k, v in state.items()}
    yield "width", wide, r"tokens of 64 channels, expected 384 \(ViT-S/14\), 768 \(ViT-B/14\)"
    missing = {k: v for k, v in state.items() if k != "blocks.1.ls2.gamma"}
    yield "missing", missing, r"missing blocks\.1\.ls2\.gamma \(32,\)"
    yield "surplus", state | {"head.weight": torch.zeros(9, 32)}, r"surplus head\.weight \(9, 32\)"
    patch16 = state | {"patch_embed.proj.weight": torch.zeros(32, 3, 16, 16)}
    yield "patch 16", patch16, r"patch_embed\.proj\.weight has shape \(32, 3, 16, 16\), expected"
    grid = state | {"pos_embed": torch.zeros(1, 17, 32)}
    yield "grid", grid, r"pos_embed has shape \(1, 17, 32\), expected \(1, 26, 32\)"
    timm_grid = timm_layout(state) | {"pos_embed": torch.zeros(1, 26, 32)}
    yield "timm with a class position", timm_grid, r"pos_embed has shape \(1, 27, 32\), expected \(1, 26"
    yield "both", state | {"reg_token": torch.zeros(1, 4, 32)}, r"surplus reg_token \(1, 4, 32\)"
    yield "flat positions", state | {"pos_embed": torch.zeros(26, 32)}, "is no DINOv2 vision transformer"
    separate = {f"embeddings.{k}": v for k, v in state.items()}
    yield "other names", separate, "is no DINOv2 vision transformer.*embeddings.mask_token"


@pytest.mark.usefixtures("known_tiny")
@pytest.mark.parametrize("state, message", [pytest.param(*x, id=name) for name, *x in broken_files()])
def test_wrong_files_are_refused(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    path = tmp_path / "file.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError, match=message):
        load_vit(path)


def test_files_of_other_networks_are_refused(tmp_path: Path, random_teacher: Path) -> None:
    with pytest.raises(WeightsError, match="is no DINOv2 vision transformer.*got conv1"):
        load_vit(random_teacher)
    with pytest.raises(WeightsError, match="no such weight file"):
        load_vit(tmp_path / "absent.pth")


@torch.inference_mode()
def test_the_merged_form_is_the_same_function(tiny: ViT, images: Tensor) -> None:
    for found, expected in zip(
        tiny.merged(torch.float32, TINY_TAPS)(images),
        tiny.features(normalise(images), TINY_TAPS),
        strict=True,
    ):
        assert found.shape == expected.shape == (3, 32, 4, 4)
        assert relative(found, expected) < 1e-5  # FP32; values to 3, differences of 3e-6 seen


@torch.inference_mode()
def test_the_merged_form_in_float16(tiny: ViT, images: Tensor) -> None:
    merged = tiny.merged(torch.float16, TINY_TAPS)
    for found, expected in zip(merged(images), tiny.features(normalise(images), TINY_TAPS), strict=True):
        assert found.dtype == torch.float32
        assert relative(found, expected) < 2e-3  # 5e-4 seen; one rounding to float16 is 5e-4
    norms = [m for m in merged.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 7 and {n.weight.dtype for n in norms} == {torch.float32}


@pytest.mark.parametrize("size", [300, 60_000])
@torch.inference_mode()
def test_large_activations_do_not_overflow_float16(tiny: ViT, images: Tensor, size: int) -> None:
    """The square of 300 is beyond float16, and so is the sum of 60000 and what a block adds to it."""
    tiny.pos_embed[..., 5] = size
    tiny.for_size(TINY_PX)
    tiny.blocks[0].ls2.gamma[5] = -size / 3
    merged = tiny.merged(torch.float16, TINY_TAPS)
    assert abs(merged.blocks[0](merged.constant)[..., 5]).max() > size
    for found, expected in zip(merged(images), tiny.features(normalise(images), TINY_TAPS), strict=True):
        assert relative(found, expected) < 2e-3


@torch.inference_mode()
def test_the_mean_colour_is_exact_in_float16(tiny: ViT) -> None:
    """Rounded weights and a bias that knows it: the fold adds no error where the image is the mean."""
    colour = (255 * IMAGENET_MEAN).round()
    image = colour.view(1, 3, 1, 1).expand(1, 3, TINY_PX, TINY_PX).contiguous()
    merged = tiny.merged(torch.float16, TINY_TAPS)
    weights, bias = merged.patches.weight.double(), merged.constant[:, 1 + REGISTERS :].double()
    exact = (weights * image[..., :14, :14]).sum(dim=(1, 2, 3)) + merged.patches.bias.double() + bias
    plain = tiny.patch_embed.proj(normalise(image))[0, :, 0, 0] + tiny.positions
    torch.testing.assert_close(exact, plain.double(), atol=1e-5, rtol=1e-5)


def exported(merged: MergedViT, images: Tensor) -> bytes:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    program = torch.onnx.export(
        merged,
        (images,),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        external_data=False,
        input_names=["image"],
        output_names=["earlier", "later"],
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float32, 1e-4),
        (torch.float16, 2e-3),  # 3e-4 seen: ONNX Runtime computes float16 in float32 on the CPU
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # the exporter warns about its own internals
def test_the_graph(tiny: ViT, images: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    content = exported(tiny.merged(dtype, TINY_TAPS), images)
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    types = Counter(node.op_type for node in model.graph.node)
    # Per block two norms, six products and one softmax; the final norm once per tap.
    assert (types["LayerNormalization"], types["MatMul"], types["Softmax"]) == (8, 18, 3)
    assert types["Erf"] == 3 and not {"Shape", "Where", "Resize", "Expand"} & set(types)

    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.output]}
    kinds |= {v.name: v.data_type for v in inferred.initializer}
    half = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}[dtype]
    wanted = dict.fromkeys(("LayerNormalization", "Softmax"), onnx.TensorProto.FLOAT)
    wanted |= dict.fromkeys(("MatMul", "Conv", "Erf"), half)
    for node in model.graph.node:
        if node.op_type in wanted:
            found = {kinds[name] for name in [*node.input, *node.output] if name != "image"}
            assert found == {wanted[node.op_type]}, node.name

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = tiny.features(normalise(images), TINY_TAPS)
    for count in (1, 3):
        found = session.run(None, {"image": images[:count].numpy()})
        for value, reference in zip(found, expected, strict=True):
            assert relative(torch.from_numpy(value), reference[:count]) < tolerance
