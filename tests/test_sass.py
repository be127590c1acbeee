"""The scans of machine code: for operands that are overwritten while a wgmma reads them, and for returned registers."""

import pytest

from tests.sass import overwritten_operands, returned_registers

# A loop whose last wgmma is waited for in the next iteration.
LOOP = """
        /*0010*/                   MOV R24, RZ ;
.L_x_1:
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
{early}        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR20], R24 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR20], R24, gsb0 ;
{late}        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   MOV R56, RZ ;
        /*0080*/                   EXIT ;
"""


def scan(early: str = "", late: str = "") -> list[str]:
    def line(address: str, text: str) -> str:
        return f"        /*{address}*/                   {text} ;\n" if text else ""

    return overwritten_operands(LOOP.format(early=line("0028", early), late=line("0048", late)))


def test_what_waits_is_clean():
    assert scan() == []
    assert scan(early="LDG.E.128 R56, desc[UR10][R2.64]") == []
    assert scan(late="STG.E.128 desc[UR10][R2.64], R56") == []
    assert scan(late="ISETP.GT.AND P0, PT, R56, 0x2, PT") == []
    assert scan(late="FADD R64, R56, R57") == []
    assert scan(late="IMAD.WIDE R54, R2, 0x2, R4") == []


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R57, RZ",
        "LDG.E.128 R60, desc[UR10][R2.64]",
        "LDS.64 R62, [R2]",
        "IMAD.WIDE R58, R2, 0x2, R4",
        "SHFL.BFLY PT, R63, R5, 0x1, 0x1f",
        "LDSM.16.M88.4 R53, [R2]",
        "HGMMA.64x128x16.F32.BF16 R0, gdesc[UR20], R0",
    ],
)
def test_writes_before_the_wait_are_found(instruction):
    assert scan(late=instruction)


def test_waits_are_for_groups():
    """A wait that leaves one group in flight is none for the last."""
    pending = LOOP.replace("gsb0, 0x0", "gsb0, 0x1")
    assert overwritten_operands(pending.format(early="", late=""))
    at_the_end = "        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    assert overwritten_operands(LOOP.replace(at_the_end, "").format(early="", late=""))


def test_addresses_are_followed_as_labels_are():
    """cuobjdump prints branches to addresses."""
    code = LOOP.format(early="", late="").replace(".L_x_1:\n", "").replace("`(.L_x_1)", "0x18")
    back = code.replace(
        "/*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0", "/*0018*/                   MOV R58, RZ"
    )
    assert overwritten_operands(code.replace("0x18", "0x20")) == []
    assert len(overwritten_operands(back)) == 1


# The producer's branch gives back all registers from 24 on, then meets the consumers'.
PRODUCER = """
        /*0000*/                   MOV R40, RZ ;
        /*0010*/              @!P0 BRA 0x50 ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0030*/                   MOV R23, RZ ;
        /*0040*/                   BRA 0x70 ;
        /*0050*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
        /*0060*/                   MOV R200, RZ ;
        /*0070*/                   IADD3 R4, R23, UR40, RZ ;
        /*0080*/                   EXIT ;
"""


def test_registers_that_were_given_back_are_found():
    assert returned_registers(PRODUCER) == []
    (found,) = returned_registers(PRODUCER.replace("MOV R23", "MOV R24"))
    assert found == "MOV R24, RZ after USETMAXREG.DEALLOC.CTAPOOL 0x18"
    assert len(returned_registers(PRODUCER.replace("R4, R23", "R4, R40"))) == 1  # where the branches meet
