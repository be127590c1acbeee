"""Every kernel that ships, compiled for every arch."""

import pytest

from tests.compile_gate.gate import ARCHS, assert_clean, compile_specialization
from tests.compile_gate.shipped import OPS

SHIPPED = [
    pytest.param(arch, specialization, id=f"{op}-sm{arch}-{specialization.name}".replace(" ", "-"))
    for op, shipped in OPS.items()
    for arch in ARCHS
    for specialization in shipped(arch)
]


@pytest.mark.parametrize("arch, specialization", SHIPPED)
def test_shipped_kernel_is_clean(arch, specialization):
    report = compile_specialization(specialization, arch)
    assert_clean(report, arch, tma=specialization.tma, mma=specialization.mma)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_every_op_ships_forms_with_names_of_their_own(op, arch):
    names = [specialization.name for specialization in OPS[op](arch)]
    assert names and len(names) == len(set(names))
