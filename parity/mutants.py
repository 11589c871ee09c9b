"""Corrupted kernels: would parity notice?

`python -m parity mutate` corrupts one function of `fade_fast` at a time, in memory, runs the cases of its
subject until one fails, and takes the change back. A mutant that no case notices *survives*, and the
command exits with 1: then a case is missing. It also exits with 1 for a mutant that is *stale*: its
function or its operation is no longer in the source, or the change breaks the function instead of
corrupting it. Then this list has to follow.

To add one: a name, the function's path below `fade_fast`, the change of an operation as
[mutation.py](mutation.py) has it, and a pattern of the titles of the cases that have to notice, the fewer
the better.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from . import subjects
from .case import Outcome, perform
from .mutation import (
    Change,
    Stale,
    assignment,
    attribute,
    binary,
    call,
    changed,
    choice,
    compare,
    condition,
    constant,
    function_at,
    item,
    iterable,
    logical,
    name,
)
from .report import _laid_out


@dataclass(frozen=True)
class Mutant:
    """One corruption of `where`, a function `module.name` of fade_fast, or of fade_ref by its full path."""

    name: str
    where: str
    change: Change
    cases: str  # what the titles of the cases that must notice have in common


CORRUPTIONS = {
    # -- packing
    "kernels.rotated.pack": [
        ("swapped nibbles", call("arange").taking(constant(8)).becomes("_.flip(0)"), "packing, 4"),
        ("cut codes, other place", constant(6).becomes("7"), "packing, 3"),
        ("whole codes swapped", call("split").becomes("[_[i] for i in (1, 0, 2, 3)]"), "packing, 3"),
    ],
    "kernels.rotated.unpack": [
        ("swapped nibbles, unpacking", call("arange").taking(constant(8)).becomes("_.flip(0)"), "packing, 2"),
        ("cut codes lost", binary("<<").becomes("0 * _"), "packing, 3"),
    ],
    "kernels.packed.fields": [
        ("fields in reverse", item("FIELDS").becomes("reversed(_)"), "packing, 4"),
        ("center of three bits", call("center").becomes("_ + (_ == 3.5)"), "packing, 3"),
    ],
    "kernels.packed.operands": [
        ("cut codes swapped in products", iterable().becomes("_[::-1]"), "packing, 3"),
        ("high bits left out of products", binary("<<").becomes("_ % 4"), "packing, 3"),
    ],
    "kernels.packed.channels": [
        ("bits of cut codes in reverse", call("chunk").becomes("_[::-1]"), "packing, 3"),
        ("high bits left out of sums", constant(4).becomes("0"), "packing, 3"),
    ],
    # -- codes and scales
    "kernels.rotated.quantize_apart": [
        ("shifted scale", call("clamp").taking(name("SMALLEST_SCALE")).becomes("1.01 * _"), "encode, 4 bits"),
        (
            "codes from the unrounded scale",
            call("half")[1].drop() & call("Packed")[0].argument(1).becomes("_.half()"),
            "encode, 8 bits",
        ),
        ("subnormal scales", name("SMALLEST_SCALE").becomes("1e-7"), "encode, 4 bits"),
        ("ties away from even", call("round").becomes("(_of + 0.5).floor()"), "codes of exact inputs"),
        ("codes not clamped", call("clamp").taking(constant(0)).drop(), "encode, 8 bits/D64 fp16"),
        ("biased norm", call("square").becomes("0.99 * _"), "encode, 2 bits"),
        ("cells of 2 bits at 3", item("STEPS").index.becomes("2"), "encode, 3 bits"),
    ],
    "kernels.rotated.encode": [
        ("dropped mean", compare("is").becomes("True"), "encode, 4 bits"),
        ("rotation transposed", attribute("mT").drop(), "encode, 8 bits"),
    ],
    "kernels.rotated.decode": [
        ("mean not added back", compare("is").becomes("True"), "decode, 4"),
        ("rotated back the wrong way", binary("@").becomes("_0 @ _1.mT"), "decode, 8"),
    ],
    "kernels.rotated.scaled": [
        ("zero dropped", compare("is")[1].becomes("True"), "decode, 8"),
        ("codes without a zero point not centered", compare("is")[0].becomes("False"), "life/matched"),
    ],
    # -- choosing what to read
    "kernels.halves.join": [
        ("halves of a key swapped", call("cat")[1].becomes("_.roll(1, -1)"), "life/choosing/a page"),
        ("halves of single bits swapped", call("cat")[0].becomes("_.roll(1, -1)"), "life/choosing/index k1"),
        ("upper bits lost", name("odd").becomes("0"), "life/choosing/a page"),
    ],
    "kernels.halves.coarse": [
        ("cells read at their lowest code", name("lowest").becomes("0.0"), "life/choosing/three pages"),
    ],
    "kernels.halves.as_two_bits": [
        ("a bit is read as the codes 0 and 2", call("cat").becomes("_ & 0xAA"), "life/choosing/index k1"),
    ],
    "kernels.summaries.summarize": [
        ("padding is a key of the page", call("where")[0].becomes("keys"), "life/choosing/index bounds"),
        ("deviations squared", call("sqrt").becomes("_of"), "life/choosing/index deviation"),
    ],
    "kernels.summaries._moments": [
        ("the smallest bound", call("clamp_min").becomes("_of.clamp_max(0)"), "life/choosing/index bounds"),
    ],
    "kernels.summaries._of_pages": [
        ("the mean alone", name("DEVIATIONS").becomes("0.0"), "life/choosing/index deviation"),
    ],
    "kernels.select._mass": [
        ("the heaviest head of a group", call("mean").becomes("_of.amax(2)"), "life/choosing"),
        ("the best token of a page", call("reduce")[1].becomes("torch.ones_like(tops)"), "life/choosing"),
    ],
    "policies.select._choose": [
        ("first pages of blocks", call("arange").becomes("0 * _"), "choosing/blocks, index deviation+k2"),
        ("the lightest pages", call("topk")[1].given(largest="False"), "life/choosing/a page"),
        (
            "a share without the page that reaches it",
            compare("<").becomes("before + weight < share"),
            "a share",
        ),
    ],
    "policies.select._touch": [
        (
            "a dropped page is still looked for",
            call("full_like")[1].becomes("replaced"),
            "life/choosing/host",
        ),
        ("slots in use are replaced", call("_put")[0].drop(), "life/choosing/host"),
    ],
    "cache.select_store.SelectStore._make_resident": [
        ("the first pages not resident", call("copy_").drop(), "life/choosing/host"),
    ],
    "cache.select_store._fetch_rows": [
        ("a fetched page does not stay", call("index_copy_").drop(), "life/choosing/host"),
    ],
    "kernels.pages._gather": [
        ("pages of the first head", binary("+")[0].becomes("_1"), "life/choosing/a page"),
        ("pages beyond the share are read", compare("is").becomes("True"), "life/choosing/a share"),
    ],
    "cache.layer.KVLayer._attend_chosen": [
        ("scaling of chosen pages", attribute("scaling").becomes("1.0"), "life/choosing/a page"),
    ],
    # -- the matched codec
    "kernels.matched._quantize": [
        ("feedback not scaled", binary("/")[0].becomes("_0"), "matched codes, 4"),
        ("the second pass in the first scale", binary("/")[1].becomes("_0"), "matched codes, 2"),
        ("the second pass by the root of the moment", binary("@")[1].becomes("_1"), "matched codes, 3"),
    ],
    "kernels.matched._round": [
        ("errors of earlier groups lost", binary("@")[0].becomes("0 * (_)"), "matched codes, 4"),
        ("errors of earlier blocks lost", binary("@")[1].becomes("0 * (_)"), "matched codes, 4"),
        ("errors of later channels lost", call("triu").becomes("0 * _"), "matched codes, 3"),
    ],
    "kernels.matched._search": [
        ("any scale", call("argmax").becomes("0 * _"), "matched codes, 2"),
        ("the longest codes", binary("+").becomes("_0"), "matched codes, 2"),
    ],
    "kernels.matched._round_block": [
        ("errors of the own block lost", binary("@").becomes("0 * (_)"), "matched codes, 4"),
    ],
    "kernels.matched._in_units": [
        ("distance of other levels", call("sqrt").becomes("1.2 * _"), "matched codes, 2"),
        ("the first scale, not the best", compare("<")[0].becomes("(_) & False"), "matched codes, 4"),
        ("scales that clip", call("maximum").becomes("best"), "matched codes, 2"),
    ],
    "kernels.matched._finish": [
        ("biased scale", call("square").becomes("1.1 * _"), "matched codes, 4"),
    ],
    "kernels.matched.encode": [
        ("matrix transposed", attribute("mT").drop(), "matched codes, 8"),
    ],
    "kernels.matched._centered": [
        ("dropped mean of matched keys", compare("is").becomes("True"), "matched codes, 4"),
    ],
    "kernels.matched._encode_both": [
        ("values encoded as keys", item("tables")[1].becomes("tables[:2]"), "life/matched"),
    ],
    "formats.matched.MatchedFormat.key_means": [
        ("mean not rotated to its block", call("rotate").becomes("still.clone()"), "life/matched")
    ],
    "formats.matched.MatchedTier.encode": [
        ("matrices of keys and values swapped", attribute("matrices").becomes("_[::-1]"), "life/matched")
    ],
    "kernels.rotated._key_mean": [
        ("mean counts padding", call("sum").inside(call("clamp_min")).object.becomes("_ | True"), "key mean")
    ],
    "kernels.rotated.in_tiles": [
        ("means of the first tile", item("mean").becomes("mean[:, :, : _.shape[2]]"), "random traces")
    ],
    "kernels.rotated._encode_both": [
        (
            "values centered like keys",
            call("encode")[1].argument(1).becomes("mean[:, :, :1]"),
            "encode keys and values",
        ),
        ("widths of keys and values swapped", item("bits")[0].exchange(item("bits")[1]), "life/widths/k8v4"),
    ],
    "formats.rotated.requantize": [
        (
            "lower tier from codes, not numbers",
            call("dequantize").argument(0).becomes("_._replace(scale=torch.ones_like(_.scale))"),
            "move to a lower tier",
        )
    ],
    # -- scores and sums of a tier
    "kernels.packed.products": [
        ("scale of the next token", binary("/")[-1].becomes("_.roll(1, 1)"), "tiles/4"),
        ("zero dropped from scores", attribute("total").becomes("0 * _"), "tiles/4"),
        ("mean dropped from scores", call("_spread").becomes("0.0"), "tiles/2"),
    ],
    "kernels.packed._near": [("mean of the block before", binary("//").becomes("max(0, _ - 1)"), "tiles/8")],
    "kernels.packed.scores": [
        ("missing softcap", call("tanh").drop(), "step, 4 bits/D64 softcap"),
        ("mask ignored", call("where").having(attribute("inf")).becomes("_1"), "step, 4 bits/D64 window"),
    ],
    "kernels.decode._for_rows": [
        ("mask of another query", call("unsqueeze").object.becomes("_.flip(1)"), "step, 4 bits/D64 window"),
        (
            "interleaved rows in one place",
            call("expand").becomes("_.transpose(1, 2)"),
            "step, 4 bits/D64 window",
        ),
    ],
    "kernels.packed.tiles": [
        ("skipped last token", call("min").becomes("max(1, _ - 1)"), "step, 4 bits/D64 plain"),
        ("skipped last tile", call("range").becomes("range(_0, max(1, _1 - _2), _2)"), "tiles/4"),
    ],
    "kernels.packed.sums": [
        ("value scale of the next token", call("finite").becomes("_.roll(1, 1)"), "tiles/3")
    ],
    "kernels.packed.statistics": [
        ("value zero dropped", compare("is not").becomes("False"), "tiles/8"),
        ("value offset halved", call("center").becomes("_ / 2"), "tiles/4"),
    ],
    "kernels.packed.join": [
        ("chunks not rescaled", call("exp2").becomes("torch.ones_like(_)"), "chunks/4 bits"),
        ("bound forgotten", call("reshape").becomes("torch.ones_like(_)"), "chunks/2 bits"),
    ],
    "kernels.packed.offset": [("float16 products keep the offset", condition().becomes("False"), "twin")],
    "kernels.packed.decoded_products": [
        ("stale position", call("cos_sin").argument(0).becomes("_ - 1"), "step, 4 bits/D64 before RoPE"),
        (
            "pairs rotated as halves",
            attribute("interleaved").inside(call("as_sum")).becomes("False"),
            "before RoPE, pairs",
        ),
    ],
    "kernels.packed.probabilities": [
        ("probabilities of one row", call("sum").becomes("_of[:, 0]"), "two widths")
    ],
    # -- the step
    "kernels.decode._attend": [
        (
            "wrong GQA head",
            call("reshape")[0].object.becomes("_.unflatten(1, (-1, keys.shape[1])).transpose(1, 2)"),
            "step, 4 bits/D64 plain",
        ),
        ("scaling forgotten", name("scaling")[0].becomes("1.0"), "step, 8 bits/D64 plain"),
        ("softcap of the tiers only", call("tanh").drop(), "step, 8 bits/D64 softcap"),
        (
            "learned sinks not counted",
            compare("is not").having(name("s_aux"))[1].becomes("False"),
            "learned sinks",
        ),
        (
            "uncompressed mask of another query",
            call("_for_rows")[0].argument(0).becomes("_.flip(1)"),
            "step, 4 bits/D64 window",
        ),
        (
            "no reference without uncompressed tokens",
            call("where").taking(compare(">")).becomes("_1"),
            "tiers alone",
        ),
        (
            "not rotated back",
            call("narrow").on("matrix")[1].becomes("torch.eye(_2)"),
            "step, 4 bits/D64 plain",
        ),
        (
            "means of the tier before",
            assignment("start").having(name("means")).drop(),
            "step, 4 bits/D64 two tiers",
        ),
        (
            "sums of a tier with another's weight",
            binary("+").inside(item("factors")).becomes("_0"),
            "step, 4 bits/D64 two tiers",
        ),
        (
            "values that nothing sees",
            call("where").taking(compare("<=")).becomes("_1"),
            "step, 4 bits/D64 window",
        ),
        ("mass not normalized", call("log2").becomes("0.0"), "step, 4 bits/D64 two tiers"),
        ("mass past the slots read", call("new_zeros").rename("new_ones"), "step, 4 bits/D64 holes"),
        ("mass of the padded row", call("narrow").inside(call("copy_")).drop(), "step, 4 bits/D64 two tiers"),
        ("last join without its shrink", item(at=-1).becomes("1.0"), "step, 4 bits/D64 plain"),
    ],
    "kernels.decode._rows_of": [
        ("learned sinks of another head", call("reshape")[0].object.becomes("_.flip(0)"), "learned sinks")
    ],
    "kernels.decode._part": [
        ("last slot not read", call("leading").argument(0).becomes("max(1, _ - 1)"), "step, 4 bits/D64 plain")
    ],
    # -- merge, uncompressed tokens
    "kernels.merge.merge": [("merge without the maxima", call("exp").becomes("torch.ones_like(_)"), "merge")],
    "kernels.merge.combine": [
        ("combine forgets a weight", binary("*").having(attribute("row_sum"))[1].becomes("_0"), "merge")
    ],
    "kernels.merge.soften": [("softcap forgotten in a long step", call("tanh").drop(), "softcap, int4")],
    "kernels.dense._with_tail": [
        ("settled tokens forgotten", call("merge").argument(0).becomes("_[1:]"), "many uncompressed"),
        (
            "settled tokens with another weight",
            call("Partial").argument(1).becomes("_ + 0.01"),
            "many uncompressed",
        ),
        ("values of the tail that nothing sees", call("where").becomes("_1"), "many uncompressed"),
    ],
    # -- what tokens received
    "policies.scores.Observer.add_step": [
        ("new token keeps what its slot received", compare("is not").to("is"), "captured/steps/h2o, evict")
    ],
    "policies.scores.Summed.update": [
        ("queries not counted", call("sum").taking(attribute("int32")).becomes("1"), "life/policies/h2o")
    ],
    "policies.scores.Decayed.update": [
        (
            "average that starts from nothing",
            call("where").taking(compare("<")).becomes("_2"),
            "life/policies/ema",
        )
    ],
    "policies.scores.Windowed.advance": [
        ("ring that does not turn", call("add_").argument(0).becomes("0"), "policies/snapkv")
    ],
    "cache.layer.KVLayer._count": [
        ("old scores of new tokens", binary("/").becomes("_.roll(1, -1)"), "policies/tova")
    ],
    # -- plans
    "fade_ref.plan.rank": [
        ("wrong tie order", call("argsort").on("position").given(descending="False"), "ties everywhere"),
        ("NaN is best", call("nan_to_num").given(nan="1e300"), "NaN"),
        ("padding has a place", call("masked_fill").drop(), "many ties"),
    ],
    "fade_ref.plan._assign": [
        ("budget of one more", compare("<")[0].to("<="), "given scores, normal"),
        ("second budget not after the first", call("masked_fill")[1].drop(), "given scores, normal"),
    ],
    "policies.plan.kept": [
        ("newest first", call("argsort").given(descending="True"), "given scores, normal")
    ],
    "policies.plan.scores": [("oldest are best", choice().becomes("-_"), "life/policies/position")],
    # -- positions
    "kernels.rope.cos_sin": [
        ("rotated backwards", call("sin").becomes("-_"), "positions/rotate"),
        ("angles in float32", call("double").every().rename("float"), "positions/rotate"),
    ],
    "cache.budget_store.BudgetStore._renumber": [
        ("survivors keep their rank", item("evicted").becomes("0"), "renumber"),
        ("sinks not counted", attribute("n_sink").becomes("0"), "renumber"),
    ],
    "cache.dense.DenseStore.rotate_sinks": [
        ("sinks not turned", item("evicted").becomes("0 * _"), "of tokens/evict")
    ],
    # -- the life of tokens
    "cache.layer.KVLayer.num_overflow": [
        ("one block less than is due", binary("*").becomes("_ - _1"), "of tokens/int4"),
        ("a block too late", compare("<").to("<="), "of tokens/int4"),
    ],
    "cache.budget_store.BudgetStore._codes": [
        (
            "new codes before stored ones",
            call("concatenated").argument(0).becomes("_[::-1]"),
            "of tokens/evict",
        ),
        ("codes of the wrong slot", call("take")[2].argument(1).becomes("(_ - 1).relu()"), "of tokens/evict"),
    ],
    "cache.budget_store.BudgetStore._fix_mean": [
        (
            "mean fixed anew",
            logical("and").becomes("False") & compare("==").becomes("_ | True"),
            "of tokens/evict",
        )
    ],
    "cache.layer.KVLayer.crop": [
        ("crop takes one more", assignment("count").value.becomes("_ + 1"), "random traces")
    ],
    "cache.positions.TokenPositions.select_rows": [
        ("rows stay where they are", call("take_rows").drop(), "of tokens/int4, padding")
    ],
    "cache.dense.DenseStore.place_sinks": [
        ("sinks where padding was", compare("==").becomes("_0 == _1 + 99"), "of tokens/int4, padding")
    ],
    "cache.positions.TokenPositions.extend": [
        ("padding has a position", call("masked_fill").drop(), "of tokens/int4, padding")
    ],
    "hf.cache.TieredKVCache.batch_repeat_interleave": [
        ("rows repeated as a whole", call("repeat_interleave").rename("repeat"), "rows that come")
    ],
    "cache.store.CompressedStore.map": [
        ("rows of the middle stay", attribute("means")[0].becomes("None"), "random traces")
    ],
    # -- what queries see
    "cache.reads.AttentionQuery.sees": [
        ("future tokens are seen", compare("<=").becomes("_ | True"), "of tokens/int4"),
        ("window of one more", compare(">").to(">="), "what models ask/window"),
    ],
    "cache.reads.AttentionQuery.tier_at": [
        (
            "windows go by logical positions",
            logical("and").becomes("False"),
            "what models ask/window, survivors",
        )
    ],
    "cache.dense.DenseStore.read_at": [
        ("windows over sinks where they were", binary("+").becomes("_0"), "what models ask/all, evict")
    ],
    "cache.step._later_step": [
        ("window forgotten before the first demotion", compare("is not").becomes("False"), "outgrows")
    ],
    # -- long steps
    "cache.reads.AttentionQuery._plain": [
        ("long steps look ahead", constant(True).becomes("False"), "long steps/int4"),
        ("long steps forget their earlier blocks", binary("-")[0].becomes("0 * _"), "long steps/int4"),
        (
            "long steps read the same slots again and again",
            call("tiles").becomes("[(0, b - a) for a, b in _]"),
            "long steps/int4",
        ),
    ],
    "cache.reads.AttentionQuery.hides": [
        ("long steps see padding", attribute("has_padding").becomes("False"), "long steps/int4"),
        (
            "long steps see past windows",
            attribute("window").becomes("None") & attribute("step_mask").becomes("None"),
            "long steps/int4, window",
        ),
    ],
    "cache.reads.AttentionQuery._decoded": [
        (
            "values decoded as keys",
            attribute("decode_values").becomes("self.layer.middle.decode_keys"),
            "long steps/int4",
        )
    ],
    "cache.reads.AttentionQuery._masked": [
        (
            "slots without a token read",
            call("sees")[-1].becomes("torch.ones_like(_)"),
            "long steps/evict, padding",
        ),
        ("a mask for the tile before", call("sees")[-1].becomes("_.roll(1, -1)"), "long steps/int4, window"),
    ],
    "kernels.flash.attend": [
        ("a query without keys counts", call("any").becomes("torch.ones_like(_)"), "long steps/int4, window"),
    ],
    # -- checkpoints
    "saved.checkpoint._of_tiered": [
        ("bounds not stored", attribute("bound")[-1].becomes("2 * _"), "checkpoints/tiers/k4v4"),
        ("means not stored", item("means").becomes("0 * _"), "checkpoints/tiers/k4v4"),
        ("sinks taken to be placed", attribute("sinks_placed").becomes("True"), "sinks to come"),
    ],
    "saved.checkpoint._fill_tiered": [
        (
            "sinks as they are read now",
            call("pop")
            .taking(constant("sink_keys"))
            .becomes("(_, layer.dense['key'][:, :, : layer.config.n_sink].clone())[1]"),
            "checkpoints/policies/position, contiguous",
        ),
        (
            "ring from its start",
            call("copy_").having(constant("observer.")).becomes("_0"),
            "checkpoints/policies/snapkv",
        ),
        (
            "tokens evicted and demoted mixed up",
            call("pop").taking(constant("evicted")).exchange(call("pop").taking(constant("demoted"))),
            "checkpoints/policies/position, contiguous",
        ),
    ],
    "saved.checkpoint._fill_timeline": [
        ("holes forgotten", name("holes").becomes("False"), "checkpoints/what came before/padding")
    ],
    "saved.checkpoint.state_dict": [
        ("newest token lost", attribute("logical").becomes("_[:, :-1]"), "checkpoints/tiers/off")
    ],
    "saved.checkpoint.load_state_dict": [
        (
            "another file than was asked for",
            compare("!=").having(constant("config")).becomes("False"),
            "checkpoints/refused",
        ),
        (
            "codes that no cache has",
            call("_refuse_product").becomes("None"),
            "checkpoints/refused",
        ),
    ],
    "hf.foreign.ForeignLayer.load": [
        ("window one token late", item(at="cumulative_length").becomes("_ - 1"), "checkpoints/sliding")
    ],
    # -- captured steps
    "cache.decode_graph.DenseGroup.refresh": [
        (
            "captured step in the wrong slot",
            call("fill_").on("slot").argument(0).becomes("_ - 1"),
            "captured/steps/int4",
        )
    ],
    "cache.decode_graph.DecodeGraph._advance": [
        ("captured step one position late", call("add_")[0].argument(0).becomes("0"), "captured/steps/int4")
    ],
    "cache.decode_graph.DecodeGraph._reorder": [
        (
            "rows of a beam search stay where they were",
            call("select").becomes("None"),
            "captured/steps/int4, beams",
        )
    ],
    "cache.decode_graph.DenseGroup.advance": [
        (
            "a draft sees those after it",
            compare("<=").becomes("_0 <= _1[-1:]"),
            "captured/steps/int4, drafted",
        )
    ],
    "cache.decode_graph.DecodeGraph.crop": [
        (
            "refused drafts keep their places",
            call("sub_")[0].argument(0).becomes("0"),
            "captured/steps/int4, drafted",
        )
    ],
    "cache.decode_graph.DecodeGraph._demote": [
        (
            "what is demoted beside drafts is taken from their tokens",
            call("sub_").argument(0).becomes("0"),
            "captured/steps/evict, drafted",
        )
    ],
}

MUTANTS = [
    Mutant(title, where, change, cases)
    for where, changes in CORRUPTIONS.items()
    for title, change, cases in changes
]


@contextmanager
def corrupted(mutant: Mutant) -> Iterator[None]:
    """fade_fast with the mutant in it. Raises `Stale` if its function or its operation is not there."""
    path = mutant.where if mutant.where.startswith("fade_ref.") else f"fade_fast.{mutant.where}"
    with changed(function_at(path), mutant.change):
        yield


@dataclass
class Fate:
    """What became of a mutant: the case that noticed it, if one did."""

    mutant: Mutant
    noticed: Outcome | None = None
    ran: int = 0
    stale: str = ""

    @property
    def caught(self) -> bool:
        return self.noticed is not None and not self.stale

    @property
    def how(self) -> str:
        if self.stale:
            return self.stale
        if self.noticed is None:
            return f"nothing, in {self.ran} cases"
        if self.noticed.raised:
            return self.noticed.raised[:60]
        worst = max(self.noticed.checks, key=lambda c: c.excess)
        return f"{worst.claim}: {worst.error:.2g} > {worst.allowed:.2g}"


#: What cases raise if a mutant breaks its function: any case would notice that.
BROKEN = ("NameError", "UnboundLocalError")


def hunt(mutant: Mutant, cases) -> Fate:
    """Run cases until one fails that does not fail without the mutant."""
    fate = Fate(mutant)
    try:
        with corrupted(mutant):
            for case in cases:
                if mutant.cases in case.title and not case.known:
                    fate.ran += 1
                    outcome = perform(case)
                    if not outcome.passed:
                        fate.noticed = outcome
                        break
    except Stale as error:
        fate.stale = f"stale: {error}"
    if fate.noticed is not None and fate.noticed.raised.startswith(BROKEN):
        fate.stale = f"stale: it breaks the function: {fate.noticed.raised}"
    elif fate.noticed is not None and not perform(fate.noticed.case).passed:
        fate.stale = f"{fate.noticed.case.title} fails without it, too"
    return fate


def main(only: str = "", mutants: Sequence[Mutant] = MUTANTS) -> int:
    """Hunt all mutants whose name has `only`; print what noticed each; 1 if one survives."""
    chosen = [m for m in mutants if only in m.name]
    if not chosen:
        raise ValueError(f"--only {only}: no mutant has it in its name")
    cases = subjects.collect()
    with tqdm(chosen, unit="mutant", leave=False, disable=None) as bar:
        fates = [hunt(mutant, cases) for mutant in bar]
    lines = [
        (f.mutant.name, f.mutant.where, f.noticed.case.title if f.noticed else "", f.how,
         "caught" if f.caught else "SURVIVES")
        for f in fates
    ]  # fmt: skip
    print("\n".join(_laid_out(("mutant", "of fade_fast", "noticed by", "how", "fate"), lines)))
    survivors = sum(not f.caught for f in fates)
    print(f"\n{len(fates)} mutants: {survivors or 'none'} survived")
    return int(survivors > 0)
