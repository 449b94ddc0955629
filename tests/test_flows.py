"""Flow blocks: inverse and log-determinant against autograd, the fast pass against FrEIA's, key maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode, SequenceINN
from FrEIA.modules import AllInOneBlock as FreiaBlock
from FrEIA.modules import Concat, InvertibleModule, Split
from torch import Tensor, nn

from adflow import flows
from adflow._fused import FusedChain
from adflow.errors import InputError, UsageError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stirred(module: nn.Module, seed: int = 7) -> nn.Module:
    """Move every parameter away from its initial value, in float64, so that each term of the formulas counts.

    Rotations are stored in float32; here they are made orthogonal to float64 precision first.
    """
    module.double()
    for block in module.modules():
        if isinstance(block, flows.AllInOneBlock) and not block.hard:
            u, _, v = torch.linalg.svd(block.rotation)
            block.rotation = u @ v
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def autograd_logdet(function: object, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v[None])[0].flatten(), x)  # type: ignore[operator]
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


LINEAR = flows.linear_subnet(generator=seeded(1))
CASES = {
    "vector, hard": (flows.AllInOneBlock, (5,), {"subnet": LINEAR}),
    "vector, soft": (flows.AllInOneBlock, (5,), {"subnet": LINEAR, "permutation": "soft", "clamp": 1.9}),
    "vector, scaled tanh": (flows.AllInOneBlock, (4,), {"subnet": LINEAR, "clamp_mode": "tanh_scaled"}),
    "image, hard": (flows.AllInOneBlock, (3, 2, 3), {"subnet": flows.conv_subnet(3, generator=seeded(2))}),
    "image, soft": (
        flows.AllInOneBlock,
        (4, 2, 3),
        {"subnet": flows.conv_subnet(1, generator=seeded(2)), "permutation": "soft"},
    ),
    "permutation": (flows.FixedPermutation, (5,), {}),
    "glow, vector": (flows.GlowCoupling, (5,), {"subnet": LINEAR}),
    "glow, image": (flows.GlowCoupling, (4, 3, 2), {"subnet": flows.conv_subnet(3, generator=seeded(2))}),
    "pixel shuffle": (flows.PixelShuffle, (8, 2, 3), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_inverse_and_log_determinant(name: str) -> None:
    block, shape, options = CASES[name]
    flow = SequenceINN(*shape)
    for _ in range(2 if block is not flows.PixelShuffle else 1):
        flow.append(block, **options)
    stirred(flow)
    x = torch.randn(3, *shape, generator=seeded(3), dtype=torch.float64)
    z, logdet = flow(x)
    back, inverse_logdet = flow(z, rev=True)
    # float64 rounding of a few dozen operations on values of order 1
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    logdet, inverse_logdet = (torch.as_tensor(v, dtype=torch.float64).expand(3) for v in (logdet, inverse_logdet))
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=0, atol=1e-12)
    for i in range(3):
        torch.testing.assert_close(logdet[i], autograd_logdet(flow, x[i]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("permutation", ["hard", "soft"])
def test_conditional_chain_inverse_and_log_determinant(permutation: flows.Permutation) -> None:
    flow = flows.chain(6, 3, condition=4, subnet=LINEAR, clamp=1.9, permutation=permutation, generator=seeded(5))
    stirred(flow)
    x = torch.randn(4, 6, generator=seeded(3), dtype=torch.float64)
    c = torch.randn(4, 4, generator=seeded(4), dtype=torch.float64)
    z, logdet = flow(x, [c])
    torch.testing.assert_close(flow(z, [c], rev=True)[0], x, rtol=0, atol=1e-12)
    for i in range(4):
        expected = autograd_logdet(lambda v, i=i: flow(v, [c[i : i + 1]]), x[i])
        torch.testing.assert_close(logdet[i], expected, rtol=0, atol=1e-11)
    assert not torch.allclose(flow(x, [c + 1])[0], z)  # the condition matters


def test_graph_with_split_and_upsampling() -> None:
    """The pieces of U-Flow's graph fit into FrEIA's GraphINN and stay invertible."""
    options = {"subnet": flows.conv_subnet(3, generator=seeded(1)), "generator": seeded(2)}
    coarse, fine = InputNode(12, 2, 2), InputNode(3, 4, 4)
    stage = Node(coarse, flows.AllInOneBlock, options)
    split = Node(stage, Split, {"section_sizes": [8, 4], "dim": 0})
    up = Node(split.out0, flows.PixelShuffle, {})
    joined = Node([fine.out0, up.out0], Concat, {"dim": 0})
    last = Node(joined, flows.AllInOneBlock, options)
    nodes = [coarse, fine, stage, split, up, joined, last, OutputNode(last), OutputNode(split.out1)]
    flow = stirred(GraphINN(nodes))
    xs = [torch.randn(2, *shape, generator=seeded(3), dtype=torch.float64) for shape in [(12, 2, 2), (3, 4, 4)]]
    zs, logdet = flow(xs)
    back, inverse_logdet = flow(zs, rev=True)
    for x, b in zip(xs, back, strict=True):
        torch.testing.assert_close(b, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=0, atol=1e-11)


def test_pixel_shuffle_fills_cells_row_by_row() -> None:
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    ((y,), logdet) = flows.PixelShuffle([(8, 1, 1)])([x])
    assert y.tolist() == [[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]]
    assert logdet == 0
    with pytest.raises(UsageError, match="multiple of 4"):
        flows.PixelShuffle([(6, 1, 1)]).output_dims([(6, 1, 1)])


def test_zero_initialised_chain_is_the_identity_up_to_order() -> None:
    subnet = flows.linear_subnet(generator=seeded(), zero_init=True)
    flow = flows.chain(6, 4, condition=8, subnet=subnet, permutation="hard", generator=seeded(1)).double()
    x = torch.randn(5, 6, generator=seeded(2), dtype=torch.float64)
    z, logdet = flow(x, [torch.randn(5, 8, generator=seeded(3), dtype=torch.float64)])
    # The unit scale is stored in float32 before it becomes float64: 6 channels x 4 blocks x 6e-8.
    torch.testing.assert_close(z.sort(1).values, x.sort(1).values, rtol=5e-7, atol=0)
    torch.testing.assert_close(logdet, torch.zeros(5, dtype=torch.float64), rtol=0, atol=2e-6)


def test_initial_weights_come_from_the_generator_alone() -> None:
    state = torch.random.get_rng_state()

    def build(seed: int) -> dict[str, Tensor]:
        generator = seeded(seed)
        flow = flows.chain(
            5, 2, subnet=flows.linear_subnet(generator=generator), permutation="soft", generator=generator
        )
        return flow.state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["module_list.0.rotation"], other["module_list.0.rotation"])
    assert not torch.equal(first["module_list.0.subnet.0.bias"], other["module_list.0.subnet.0.bias"])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("channels", [2, 3, 40])
def test_random_rotation(channels: int) -> None:
    q = flows.random_rotation(channels, seeded(channels)).double()
    # float32 storage: entries are right to 6e-8, products of C of them to about 1e-6
    torch.testing.assert_close(q @ q.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.linalg.det(q) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("shape", [(6,), (7, 3, 2)])
def test_equals_freia_and_loads_its_weights(soft: bool, shape: tuple[int, ...]) -> None:
    """FrEIA 0.2's own block, its state dict loaded into ours, gives the same numbers and gradients."""

    def subnet(inputs: int, outputs: int) -> nn.Module:
        if len(shape) == 1:
            return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))
        return nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1), nn.ReLU(), nn.Conv2d(inputs, outputs, 1))

    theirs, ours = SequenceINN(*shape), SequenceINN(*shape)
    for _ in range(2):
        theirs.append(FreiaBlock, subnet_constructor=subnet, affine_clamping=1.9, permute_soft=soft)
        ours.append(flows.AllInOneBlock, subnet=subnet, clamp=1.9, permutation="soft" if soft else "hard")
    # Their permutation matrices stay as they are: only trained parameters are moved.
    generator = seeded(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "w_perm" not in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    flows.load_original(ours, {f"net.{k}": v for k, v in theirs.state_dict().items()}, prefix="net.")
    x = torch.randn(4, *shape, generator=seeded(3))
    z, logdet = ours(x)
    expected, expected_logdet = theirs(x)
    # float32: the same operations, sums in another order
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logdet, expected_logdet, rtol=1e-5, atol=1e-5)


def test_load_original_says_what_does_not_fit() -> None:
    flow = flows.chain(4, 1, subnet=LINEAR)
    state = flow.state_dict()
    good = {key: value for key, value in state.items() if "permutation" not in key}
    matrix = torch.eye(4)[state["module_list.0.permutation"]]
    flows.load_original(flow, {**good, "module_list.0.w_perm": matrix, "module_list.0.w_perm_inv": matrix.T})
    with pytest.raises(InputError, match="not a permutation matrix"):
        flows.load_original(flow, {**good, "module_list.0.w_perm": flows.random_rotation(4, seeded())})
    with pytest.raises(InputError, match="transpose"):
        other = torch.eye(4)[[1, 2, 3, 0]]
        flows.load_original(flow, {**good, "module_list.0.w_perm": other, "module_list.0.w_perm_inv": other})
    with pytest.raises(InputError, match=r"1 tensors missing .*module_list.0.permutation"):
        flows.load_original(flow, good)
    with pytest.raises(InputError, match="size mismatch"):
        wrong = {**good, "module_list.0.w_perm": matrix, "module_list.0.subnet.0.bias": torch.zeros(2)}
        flows.load_original(flow, wrong)


@pytest.mark.parametrize("permutation", ["hard", "soft"])
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("mode", ["tanh", "tanh_scaled"])
def test_fused_pass_equals_freia(permutation: flows.Permutation, condition: int, mode: flows.ClampMode) -> None:
    flow = flows.chain(
        9,
        3,
        condition=condition,
        subnet=LINEAR,
        clamp=1.9,
        clamp_mode=mode,
        permutation=permutation,
        generator=seeded(1),
    )
    stirred(flow)
    x = torch.randn(10, 9, generator=seeded(3), dtype=torch.float64)
    c = torch.randn(10, condition, generator=seeded(4), dtype=torch.float64) if condition else None
    z, logdet = flow(x, [c])
    likelihood = flows.log_likelihood(z, logdet)
    fused = FusedChain(flow, c)
    # float64: only the order of the sums differs
    torch.testing.assert_close(flows.log_likelihood(*fused(x)), likelihood, rtol=1e-12, atol=1e-12)
    flow.float()
    fused = FusedChain(flow, None if c is None else c.float())
    # float32 rounding (6e-8) of three blocks of sums over <= 34 terms, on values of order 100
    torch.testing.assert_close(flows.log_likelihood(*fused(x.float())).double(), likelihood, rtol=1e-5, atol=1e-5)


def test_fused_refuses_what_it_cannot_do() -> None:
    flow = SequenceINN(4)
    flow.append(flows.FixedPermutation)
    with pytest.raises(UsageError, match="fused"):
        FusedChain(flow)


def test_log_likelihood_is_the_gaussian_log_density() -> None:
    z = torch.randn(3, 4, generator=seeded())
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(flows.log_likelihood(z, torch.zeros(3)), expected)
    maps = torch.randn(2, 4, 3, 5, generator=seeded())
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(maps).sum((1, 2, 3)) + 2.0
    torch.testing.assert_close(flows.log_likelihood(maps, torch.full((2,), 2.0)), expected)


def test_positional_encoding_by_its_formula() -> None:
    code = flows.positional_encoding(8, 3, 5)
    assert code.shape == (8, 3, 5)
    for y in range(3):
        for x in range(5):
            for j in range(2):
                rate = 10000.0 ** (-2 * j / 4)
                wanted = [math.sin(x * rate), math.cos(x * rate), math.sin(y * rate), math.cos(y * rate)]
                found = code[[2 * j, 2 * j + 1, 4 + 2 * j, 4 + 2 * j + 1], y, x]
                np.testing.assert_allclose(found, wanted, atol=1e-7)  # float32 rounding of values <= 1
    with pytest.raises(UsageError, match="multiple of 4"):
        flows.positional_encoding(10, 3, 5)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UsageError, match="clamp_mode"):
        flows.AllInOneBlock([(4,)], subnet=LINEAR, clamp_mode="atan")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="permutation"):
        flows.AllInOneBlock([(4,)], subnet=LINEAR, permutation="none")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 2 channels"):
        flows.AllInOneBlock([(1,)], subnet=LINEAR)


def test_blocks_are_freia_modules() -> None:
    for block, _, _ in CASES.values():
        assert issubclass(block, InvertibleModule)
