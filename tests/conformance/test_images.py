"""Images whose tokens attend to each other: in the first chunk, in a later chunk, and in a second turn.

The reference is DynamicCache. In these families, a mask lets tokens of a step see later tokens.
"""

from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import DynamicCache

import fade_fast
from fade_fast.hf import versions
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

from ..marks import slow_but
from .cells import OFF, compressed
from .twins import read_dense

IMAGE, BOI, EOI = 250, 251, 252
TEXT = dict(
    vocab_size=260,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SQUARE = dict(image_size=28, patch_size=14)
LAYERS = dict(sliding_window=64, layer_types=["full_attention", "sliding_attention"])


@dataclass(frozen=True)
class Images:
    """A family of models with images.

    Attributes:
        name: the class name without "Config" and the head.
        config: the fields of the configuration.
        kinds: the argument of the model for token types.
        later: whether image tokens attend to each other in later chunks, too. In some families of
            transformers, later chunks are causal.
    """

    name: str
    config: dict
    kinds: str = "token_type_ids"
    later: bool = True

    def model(self):
        torch.manual_seed(0)
        kind = getattr(transformers, self.name + "Config")
        head = getattr(transformers, self.name + "ForConditionalGeneration")
        model = head(kind(**self.config)).double().eval()
        for name, x in model.named_parameters():
            if "projection_weight" in name or "multi_modal_projector" in name or "embed_vision" in name:
                x.data.normal_(0, 0.5)
        return model


FAMILIES = [
    Images(
        "Gemma3",
        dict(
            text_config=TEXT | LAYERS,
            vision_config=VISION | SQUARE,
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
            boi_token_index=BOI,
            eoi_token_index=EOI,
            tie_word_embeddings=False,
        ),
    ),
    Images(
        "PaliGemma",
        dict(
            text_config=dict(TEXT, model_type="gemma"),
            vision_config=dict(VISION, model_type="siglip_vision_model", projection_dim=64) | SQUARE,
            image_token_id=IMAGE,
            projection_dim=64,
            hidden_size=64,
            tie_word_embeddings=False,
        ),
        later=False,
    ),
]
#: The position of the image in a text of 60 tokens, and the way to feed the text: in chunks or in two turns.
PLACES = {
    "in the first chunk": (4, dict(prefill_chunk_size=30)),
    "in the second chunk": (34, dict(prefill_chunk_size=24)),
    "in a short second chunk": (52, dict(prefill_chunk_size=48)),
    "in the second turn": (34, dict(turn=24)),
    "in a short second turn": (52, dict(turn=48)),
}


def scenario(family: Images, model, cache, place: str, marked: bool = True) -> torch.Tensor:
    """Logits of three new tokens. With `marked`, the token types mark the image."""
    at, how = PLACES[place]
    ids = torch.randint(3, 240, (1, 60), generator=torch.Generator().manual_seed(1))
    ids[:, at : at + 4] = IMAGE
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = dict(do_sample=False, output_logits=True, return_dict_in_generate=True, **{CACHE_NAME: cache})
    options["prefill_chunk_size"] = how.get("prefill_chunk_size")

    def generate(ids, new, **more):
        kinds = {family.kinds: (ids == IMAGE).long() * marked}
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **kinds, **options, **more
        )

    if "turn" in how:
        generate(ids[:, : how["turn"]], 1)
    return torch.stack(generate(ids, 3, pixel_values=pixels).logits)


@pytest.mark.parametrize("place", slow_but(PLACES, "in the first chunk", "in a short second turn"))
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_images_attend_to_each_other_wherever_they_come(family, place):
    model = family.model()
    dynamic = lambda: DynamicCache(config=model.config.get_text_config())  # noqa: E731
    expected = scenario(family, model, dynamic(), place)
    causal = scenario(family, model, dynamic(), place, marked=False)
    matters = family.later or place == "in the first chunk"
    if versions.installed().startswith("5.24"):  # in older versions later chunks are causal
        assert ((expected - causal).abs().max() > 1e-6) == matters
    found = scenario(family, model, fade_fast.create_cache(model, OFF), place)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    safe = FadeConfig(recent_window=8, block_size=4)
    cache = fade_fast.create_cache(model, safe)
    found = scenario(family, model, cache, place)
    assert compressed(cache) > 0
    with read_dense():
        twin = scenario(family, model, fade_fast.create_cache(model, safe), place)
    torch.testing.assert_close(found, twin, rtol=1e-7, atol=1e-7)
