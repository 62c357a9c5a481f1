"""Names of a Wan2.1 transformer's weights: official release on one side, diffusers on the other."""

from __future__ import annotations

# Ordered: an earlier rule's result is seen by later ones. Official -> diffusers.
_RULES = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
    (".modulation", ".scale_shift_table"),
    (".norm3.", ".norm2."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
    (".cross_attn.k_img.", ".attn2.add_k_proj."),
    (".cross_attn.v_img.", ".attn2.add_v_proj."),
    (".cross_attn.norm_k_img.", ".attn2.norm_added_k."),
    (".self_attn.o.", ".attn1.to_out.0."),
    (".cross_attn.o.", ".attn2.to_out.0."),
    *(
        (f".{ours}.{letter}.", f".{theirs}.to_{letter}.")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for letter in "qkv"
    ),
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
)


def to_diffusers(name: str) -> str:
    """The name that diffusers' WanTransformer3DModel gives to the official weight `name`."""
    for ours, theirs in _RULES:
        name = name.replace(ours, theirs)
    return name
