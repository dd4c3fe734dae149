"""What the GPU's kernels take, against the bounds of scripts/cuda_resources.py."""

from __future__ import annotations

import json
import shutil

import cuda_counts
import cuda_resources
import cuda_toolkit
import pytest
from cuda_resources import Kernel

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aIdEvi' for 'sm_80'
ptxas info    : Function properties for _Z1aIdEvi
    8 bytes stack frame, 24 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 32.177 ms
ptxas info    : Compiling entry function '_Z1aIdEvi' for 'sm_100'
ptxas info    : Function properties for _Z1aIdEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


SASS = """\
\t\tFunction : _Z3runIdE
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe40000000800 */
        /*0010*/              @!P0 LDS.128 R4, [R2] ;                      /* 0x0000000000047919 */
        /*0020*/              @UP0 LD.E.64 R6, [R2.64] ;                   /* 0x0000000000047919 */
        /*0030*/                   DFMA R2, -R2, R12, 1 ;                  /* 0x3ff000000202742b */
        /*0040*/                   MUFU.RSQ64H R3, R5 ;                    /* 0x3ff000000202742b */
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;           /* 0x3ff000000202742b */
        /*0060*/                   LD.E R6, [R2.64] ;                      /* 0x0000000000047919 */
        /*0070*/                   RET.REL.NODEC R4 ;                      /* 0x3ff000000202742b */
        /*0080*/                   NOP ;                                   /* 0x3ff000000202742b */
"""
ELF = """\
   0x3                0                0  SECTION  LOCAL  DEFAULT  -  0x13  .text._Z3runIdE
   0x7             0x60             0x20  FUNC     LOCAL  DEFAULT  -  0x13  $_Z3runIdE$_ZN1a5asideIZ1fEEDaT_T0_
   0x8             0x40             0x20  FUNC     LOCAL  DEFAULT  -  0x13  $_Z3runIdE$__internal_trig
"""


def test_instructions_are_counted_by_kind():
    (kernel,) = cuda_counts.parse("a.cu", SASS, ELF)
    assert kernel.name == "_Z3runIdE"
    assert kernel.aside == 2
    assert kernel.kinds == {"constant": 1, "shared": 1, "generic": 1, "float64": 2, "barrier": 1}
    opcodes = {"FFMA.FTZ": "float32", "IMAD.WIDE": "integer", "LDG.E": "global", "STL": "local", "ULDC.64": "constant"}
    opcodes |= {"MUFU.EX2": "special", "WARPSYNC": "barrier", "CALL.REL": "control", "VOTE.ANY": "integer"}
    assert {opcode: cuda_counts.kind_of(opcode) for opcode in opcodes} == opcodes


def test_the_model_knows_that_the_chip_is_nearer_than_any_address():
    kinds = {"float32": 500, "integer": 300, "generic": 200}
    generic = cuda_counts.Counts("a.cu", "ForceKernel<float, (bool)1, (bool)1>", kinds)
    shared = cuda_counts.Counts("a.cu", generic.name, {**kinds, "generic": 0, "shared": 200})
    for clock in cuda_counts.CLOCKS.values():
        assert cuda_counts.step_time(shared, clock) < cuda_counts.step_time(generic, clock)
    lines = cuda_counts.text([generic])
    assert all(name in lines for name in ("H100", "H200", "A100", "µs", "cycles"))


def test_reports_of_ptxas_are_understood(monkeypatch):
    monkeypatch.setattr(cuda_resources, "demangle", lambda names: {name: f"demangled {name}" for name in names})
    assert cuda_resources.parse("a.cu", REPORT) == [
        Kernel("a.cu", "demangled _Z1aIdEvi", "80", 40, 8, 24, 36, 128, 400),
        Kernel("a.cu", "demangled _Z1aIdEvi", "100", 255, 0, 0, 0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void kinml::cuda::run<kinml::cuda::(anonymous namespace)::AdamStep<float> >"
            "(kinml::cuda::(anonymous namespace)::AdamStep<float>, char*, long)",
            "AdamStep<float>",
        ),
        (
            "void kinml::cuda::run<kinml::cuda::A<double, (kinml::B)1> >(kinml::cuda::A<double>, long)",
            "A<double, (B)1>",
        ),
        ("kinml::cuda::(anonymous namespace)::probe()", "probe"),
    ],
)
def test_names_are_those_of_the_source(demangled, name):
    assert cuda_resources.short_name(demangled) == name


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"registers": 90}, "AdamStep<float> on sm_90 (a.cu) takes 90 registers, more than 64"),
        ({"spill_loads": 8, "stack": 16}, "AdamStep<float> on sm_90 (a.cu) spills 8 bytes of registers, more than 0"),
        ({"stack": 16}, "AdamStep<float> on sm_90 (a.cu) has 16 bytes in local memory, more than 8"),
    ],
)
def test_what_is_beyond_the_bounds_is_said(change, fault):
    kernel = Kernel("a.cu", "AdamStep<float>", "90", **{"registers": 30, **change})
    assert kernel.faults() == ([] if fault is None else [fault])


def test_kernels_of_this_tree_stay_within_their_bounds(full, tmp_path):
    """The table that is kept, if it is of this tree, or a new one: that takes minutes."""
    origin, kernels = cuda_resources.kept()
    if origin != cuda_resources.origin(origin["nvcc"]):
        if not full:
            pytest.skip("cuda_resources.json is of other sources, and KINML_FULL_TESTS is not 1")
        if cuda_toolkit.find_nvcc() is None:
            pytest.skip("needs nvcc")
        kernels = cuda_resources.report(cuda_resources.toolkit(), ["80", "90"], tmp_path)
    assert {kernel.file for kernel in kernels} >= {"adam_cuda.cu", "launch.cu"}
    assert {kernel.architecture for kernel in kernels} >= {"80", "90"}
    assert [fault for kernel in kernels for fault in kernel.faults()] == []


def test_a_table_is_kept_with_what_it_depends_on(monkeypatch, tmp_path):
    kernels = [Kernel("a.cu", "AdamStep<float>", "90", 40), Kernel("a.cu", "AdamStep<double>", "90", 50, 8)]
    monkeypatch.setattr(cuda_resources, "TABLE", tmp_path / "table.json")
    cuda_resources.keep(cuda_resources.origin("13.0"), kernels, cuda_counts.parse("a.cu", SASS))
    assert cuda_resources.kept() == (cuda_resources.origin("13.0"), kernels)
    assert json.loads(cuda_resources.TABLE.read_text())["instructions"][0]["kinds"]["generic"] == 2

    # Another nvcc or another byte of a source is another origin.
    before = cuda_resources.origin("13.0")
    assert cuda_resources.origin("13.1") != before
    for folder in ("csrc", "cmake"):
        shutil.copytree(cuda_resources.ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(cuda_resources, "ROOT", tmp_path)
    assert cuda_resources.origin("13.0") == before
    with (tmp_path / "csrc" / "core" / "adam.h").open("a") as file:
        file.write("//\n")
    assert cuda_resources.origin("13.0") != before
