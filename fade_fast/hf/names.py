"""Names that the options of commands show. Importing this module imports nothing slow."""

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the default model
SMOLLM2 = "smollm2"  # a short name of it
DTYPES = ("bf16", "fp16", "fp32")
#: Options of `generate()` by the name of a mode of `warm`. "padded" also pads rows on the left.
MODES: dict[str, dict] = {
    "greedy": {},
    "sampled": dict(do_sample=True, temperature=0.8, top_p=0.9),
    "padded": {},
    "beams": dict(num_beams=4),
    "drafted": dict(prompt_lookup_num_tokens=4),
}
