"""What ran where, one axis after the other: the allow-list.

An axis is a list of rows of which the first that applies to a server counts; the last one applies to every server. A
row says of each capability that it ran, on what evidence; that it is known to be wrong, and what would work; that it is
SGLang's own work, to which we add nothing that depends on the axis; or that nobody ran it.

Evidence is a test of this repository, or one of :data:`RUNS`. To change a cell from "not run", run it and name the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from rksc_sgl.support.facts import Facts

CAPABILITIES = ("exact", "blend", "merge", "exit", "verify")
WORDS = {
    "exact": "exact sharing",
    "blend": "a blend",
    "merge": "a merge",
    "exit": "an early exit",
    "verify": "verification in place",
}

H100 = "H100, 2026-11-26"
RUNS = {
    H100: "one H100 of 80 GB, SGLang 0.5.23 with torch 2.11.0, triton 3.6.0 and sglang-kernel 0.4.5 (not the pinned "
    "0.4.10), its radix tree in Python, bfloat16, models of Llama's shape with random weights, decode in CUDA graphs: "
    "hooks in place, a fork of 8, a blend that computes everything against the exact prefill (0.05 to 0.07 apart where "
    "other words are 3.6 apart), a default blend, 20 mixed requests with verifications at full depth, no slot lost. On "
    "Triton attention, on FlashAttention 3, with prefill in breakable graphs and with pages of 16.",
}

SHARING = "tests/sglang_plugin/test_blends_on_a_server.py"
MERGING = "tests/sglang_plugin/test_merges_on_a_server.py"
EXITS = "tests/sglang_plugin/test_exits_on_a_server.py"
SERVING = "tests/cpu_platform/test_serving.py"
CHECK = "tests/benchmarks/test_gpu_check.py"
WALK = "tests/sglang_plugin/test_walkable.py"


class Standing(Enum):
    """What is known of a capability on one value of an axis."""

    RAN = "ran"
    WRONG = "refused"
    STOCK = "SGLang's own"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Cell:
    """One capability on one value of an axis.

    Attributes:
        text: the evidence where it ran; what is refused and what would work where it is wrong, with the names of
            :class:`Facts` in braces. Empty otherwise.
    """

    standing: Standing
    text: str = ""


STOCK, NOT_RUN = Cell(Standing.STOCK), Cell(Standing.NOT_RUN)


def ran(*evidence: str) -> Cell:
    return Cell(Standing.RAN, "; ".join(evidence))


def wrong(text: str) -> Cell:
    return Cell(Standing.WRONG, text)


@dataclass(frozen=True)
class Row:
    """One value of an axis.

    Attributes:
        name: as messages and the matrix name it.
        applies: whether a server has it.
        cells: in the order of :data:`CAPABILITIES`.
    """

    name: str
    applies: Callable[[Facts], bool]
    cells: tuple[Cell, Cell, Cell, Cell, Cell]


@dataclass(frozen=True)
class Axis:
    """One thing that differs between servers, as its values."""

    name: str
    rows: tuple[Row, ...]


def _everything(*evidence: str) -> tuple[Cell, Cell, Cell, Cell, Cell]:
    return (ran(*evidence),) * 5


def _passes(cell: Cell) -> tuple[Cell, Cell, Cell, Cell, Cell]:
    """What runs layer by layer stands so; the rest are ordinary requests, which SGLang serves as it always does."""
    return (STOCK, cell, cell, cell, STOCK)


def _any(facts: Facts) -> bool:
    return True


_ATTENTION = Axis(
    "attention backend",
    (
        Row(
            "FlashInfer where its paged path does not write first",
            lambda f: bool(f.attention_refusal),
            (STOCK, wrong("{attention_refusal}"), NOT_RUN, NOT_RUN, STOCK),
        ),
        Row("deterministic inference", lambda f: f.deterministic, _passes(NOT_RUN)),
        Row(
            "RkscCpuAttnBackend",
            lambda f: f.attention == "RkscCpuAttnBackend",
            (ran(SHARING), ran(SHARING), ran(MERGING), ran(EXITS), ran(EXITS)),
        ),
        Row("TorchNativeAttnBackend", lambda f: f.attention == "TorchNativeAttnBackend", _everything(CHECK)),
        Row(
            "TritonAttnBackend",
            lambda f: f.attention == "TritonAttnBackend",
            (ran(H100), ran(H100), NOT_RUN, NOT_RUN, ran(H100)),
        ),
        Row(
            "FlashAttentionBackend, version 3",
            lambda f: f.attention == "FlashAttentionBackend" and f.attention_version == 3,
            (ran(H100), ran(H100), NOT_RUN, NOT_RUN, ran(H100)),
        ),
        Row("FlashInferAttnBackend", lambda f: f.attention == "FlashInferAttnBackend", _passes(NOT_RUN)),
        Row("another backend", _any, _passes(NOT_RUN)),
    ),
)

_TREE = Axis(
    "prefix cache",
    (
        Row(
            "--disable-radix-cache",
            lambda f: f.tree_is_off,
            (
                wrong("nothing is shared where the radix cache is off: start without --disable-radix-cache"),
                wrong("a blend takes KV from the radix cache, which is off: start without --disable-radix-cache"),
                wrong("a merge takes KV from the radix cache, which is off: start without --disable-radix-cache"),
                STOCK,
                wrong(
                    "verification computes its whole prompt where the radix cache is off: "
                    "start without --disable-radix-cache"
                ),
            ),
        ),
        Row("UnifiedRadixCache", lambda f: f.tree == "UnifiedRadixCache", _everything(SHARING, MERGING, EXITS)),
        Row("another tree made of it", lambda f: f.tree_is_unified, (NOT_RUN, NOT_RUN, NOT_RUN, STOCK, STOCK)),
        Row(
            "a tree of another kind",
            _any,
            (
                wrong("siblings share in SGLang's unified radix tree, and this server has a {tree}"),
                wrong("a blend takes KV from SGLang's unified radix tree, and this server has a {tree}"),
                wrong("a merge takes KV from SGLang's unified radix tree, and this server has a {tree}"),
                STOCK,
                STOCK,
            ),
        ),
    ),
)


def _copying(text: str, leaving: Cell = STOCK) -> tuple[Cell, Cell, Cell, Cell, Cell]:
    """Blends and merges read KV and copy it; early exits leave it to the attention backend."""
    return (STOCK, wrong("a blend " + text), wrong("a merge " + text), leaving, STOCK)


_PLAIN_POOLS = ("MHATokenToKVPool", "LazyMHATokenToKVPool")
_WINDOW_POOLS = ("SWAKVPool", "UnifiedSWAKVPool")
_POOL = Axis(
    "KV pool",
    (
        Row(
            "quantized KV (fp8, fp4, mxfp8)",
            lambda f: f.kv_is_quantized,
            _copying(
                "cannot turn or compare quantized KV ({kv_dtype} in a {pool}): start with --kv-cache-dtype auto",
            ),
        ),
        Row(
            "a part of its own for sliding windows",
            lambda f: f.pool in _WINDOW_POOLS,
            _copying(
                "needs one slot a token, and a {pool} has other slots for sliding windows: "
                "start with --disable-hybrid-swa-memory",
                leaving=NOT_RUN,
            ),
        ),
        Row(
            "pages by head (SGLANG_USE_HND_KVCACHE) and other page layouts",
            lambda f: f.pool in _PLAIN_POOLS and f.pool_layout != "nhd",
            _copying(
                "copies KV slot by slot, and this pool is laid out by pages ({pool_layout}): "
                "start without SGLANG_USE_HND_KVCACHE and SGLANG_AITER_KV_CACHE_LAYOUT",
            ),
        ),
        Row(
            "LazyMHATokenToKVPool, float32",
            lambda f: f.pool == "LazyMHATokenToKVPool" and f.kv_dtype == "float32",
            (ran(SHARING), ran(SHARING), ran(MERGING), ran(EXITS), ran(EXITS)),
        ),
        Row(
            "MHATokenToKVPool, bfloat16",
            lambda f: f.pool == "MHATokenToKVPool" and f.kv_dtype == "bfloat16",
            (ran(H100), ran(H100), NOT_RUN, STOCK, ran(H100)),
        ),
        Row(
            "one of these with numbers of another type",
            lambda f: f.pool in _PLAIN_POOLS,
            (STOCK, NOT_RUN, NOT_RUN, STOCK, STOCK),
        ),
        Row(
            "another pool (MLA, Mamba, unified memory, page-major)",
            _any,
            _copying("copies keys and values of a head slot by slot, which a {pool} does not have"),
        ),
    ),
)

_MODEL = Axis(
    "model family",
    (
        Row(
            "layers that cannot run in intervals (Gemma 1 to 3, Granite, ...)",
            lambda f: bool(f.walk_refusal),
            _passes(wrong("{walk_refusal}")),
        ),
        Row(
            "chunked attention (Llama 4)",
            lambda f: f.attention_chunk > 0,
            _passes(wrong("the chunked attention of {model} becomes full attention where layers run in intervals")),
        ),
        Row(
            "keys that cannot be turned (MLA, M-RoPE, ...)",
            lambda f: bool(f.rotation_refusal),
            (STOCK, wrong("{rotation_refusal}"), NOT_RUN, NOT_RUN, STOCK),
        ),
        Row(
            "LlamaForCausalLM",
            lambda f: f.model == "LlamaForCausalLM",
            (ran(SHARING), ran(SHARING), ran(MERGING), ran(EXITS), ran(EXITS)),
        ),
        Row("Qwen2ForCausalLM", lambda f: f.model == "Qwen2ForCausalLM", _everything(CHECK)),
        Row("Qwen3ForCausalLM", lambda f: f.model == "Qwen3ForCausalLM", _everything(CHECK)),
        Row("another model", _any, _passes(NOT_RUN)),
    ),
)


def _no_intervals(what: str, instead: str) -> tuple[Cell, Cell, Cell, Cell, Cell]:
    return _passes(wrong(f"layers do not run in intervals with {what}: start without {instead}"))


_PARALLELISM = Axis(
    "parallelism",
    (
        Row(
            "pipeline parallelism",
            lambda f: f.pp > 1,
            _no_intervals("pipeline parallelism, where no rank has all layers", "--pp-size"),
        ),
        Row(
            "data-parallel attention",
            lambda f: f.dp_attention,
            _no_intervals(
                "data-parallel attention, which pads the batches of all ranks alike", "--enable-dp-attention"
            ),
        ),
        Row(
            "context parallelism",
            lambda f: f.cp > 1 or f.dcp > 1,
            _no_intervals("context parallelism, which splits a prompt over the ranks", "--attn-cp-size and --dcp-size"),
        ),
        Row(
            "rows split over tensor-parallel ranks",
            lambda f: f.rows_are_split,
            _no_intervals("rows that are split over the ranks between layers", "--enable-attn-tp-input-scattered"),
        ),
        Row(
            "two-batch overlap",
            lambda f: f.two_batch_overlap,
            _no_intervals("batches that run in two halves", "--enable-two-batch-overlap"),
        ),
        Row(
            "PD multiplexing",
            lambda f: f.pdmux,
            _no_intervals("SGLang's own split prefill", "--enable-pdmux"),
        ),
        Row("expert parallelism", lambda f: f.ep > 1, _passes(NOT_RUN)),
        Row("several replicas (--dp-size)", lambda f: f.dp > 1, (NOT_RUN,) * 5),
        Row("one rank", lambda f: f.tp == 1, (ran(SHARING), ran(SHARING), ran(MERGING), ran(EXITS), ran(EXITS))),
        Row(
            "tensor parallelism (--tp 2, over gloo)",
            _any,
            (ran(SHARING), ran(SHARING), ran(MERGING), ran(EXITS), ran(EXITS)),
        ),
    ),
)

_QUANTIZATION = Axis(
    "weight quantization",
    (
        Row("not quantized", lambda f: not f.quantization, _everything(SHARING, MERGING, EXITS)),
        Row("quantized", _any, _passes(NOT_RUN)),
    ),
)

_SPECULATION = Axis(
    "speculative decoding",
    (
        Row("none", lambda f: not f.speculative, _everything(SHARING, MERGING, EXITS)),
        Row(
            "with a speculation algorithm",
            _any,
            (
                STOCK,
                wrong(
                    "a blend leaves out tokens that {speculative} speculation must have seen: "
                    "start without --speculative-algorithm"
                ),
                NOT_RUN,
                wrong(
                    "an early exit leaves out layers whose states {speculative} speculation goes on from: "
                    "start without --speculative-algorithm"
                ),
                STOCK,
            ),
        ),
    ),
)

_DISAGGREGATION = Axis(
    "disaggregation",
    (
        Row("none", lambda f: f.disaggregation == "null", _everything(SHARING, MERGING, EXITS)),
        Row(
            "prefill or decode server",
            _any,
            (
                STOCK,
                wrong(
                    "a blend on a {disaggregation} server would be exact KV to the other one: "
                    "serve prefill and decode in one place"
                ),
                wrong(
                    "a merge on a {disaggregation} server would not reach the other one's prompt: "
                    "serve prefill and decode in one place"
                ),
                NOT_RUN,
                STOCK,
            ),
        ),
    ),
)

_TIERS = Axis(
    "KV tier besides the device",
    (
        Row(
            "KV sharding",
            lambda f: f.kv_sharding,
            (
                STOCK,
                wrong("a blend needs all KV of a prompt on each rank: start without --enable-kv-cache-sharding"),
                wrong("a merge needs all KV of a prompt on each rank: start without --enable-kv-cache-sharding"),
                NOT_RUN,
                STOCK,
            ),
        ),
        Row("none", lambda f: not f.tiers, _everything(SHARING, MERGING, EXITS)),
        Row(
            "hierarchical cache",
            lambda f: f.tiers == "hicache",
            (
                STOCK,
                wrong(
                    "a blend does not lock its donor against the hierarchical cache: "
                    "start without --enable-hierarchical-cache"
                ),
                wrong(
                    "a merge does not lock its donor against the hierarchical cache: "
                    "start without --enable-hierarchical-cache"
                ),
                NOT_RUN,
                STOCK,
            ),
        ),
        Row("others (LMCache, FlexKV, an external linker)", _any, _passes(NOT_RUN)),
    ),
)

_LORA = Axis(
    "adapter",
    (
        Row("none", lambda f: not f.lora, _everything(SHARING, MERGING, EXITS)),
        Row("LoRA", _any, _passes(NOT_RUN)),
    ),
)

_TOKENIZER = Axis(
    "tokenizer",
    (
        Row("there", lambda f: f.tokenizer, _everything(SHARING, MERGING, EXITS)),
        Row(
            "--skip-tokenizer-init",
            _any,
            (
                STOCK,
                NOT_RUN,
                wrong("a merge must know what prompts say: start without --skip-tokenizer-init"),
                STOCK,
                STOCK,
            ),
        ),
    ),
)

AXES = (
    _TREE,
    _ATTENTION,
    _POOL,
    _MODEL,
    _PARALLELISM,
    _QUANTIZATION,
    _SPECULATION,
    _DISAGGREGATION,
    _TIERS,
    _LORA,
    _TOKENIZER,
)
