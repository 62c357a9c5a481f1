"""Names of a Wan2.1 transformer's weights: official release on one side, diffusers on the other."""

from __future__ import annotations

from collections.abc import Mapping

# Official -> diffusers: the beginning of a weight's name, up to a dot or the end.
_NAMES = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
# The same behind "blocks.N.". Norms 1 and 3 of diffusers' blocks have no weights.
_BLOCK_NAMES = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    **{
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
            ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
}  # fmt: skip


def to_diffusers(name: str) -> str:
    """The name that diffusers' WanTransformer3DModel gives to the official weight `name`."""
    return _translated(name, _NAMES, _BLOCK_NAMES)


def to_official(name: str) -> str:
    """The official name of the weight that diffusers' WanTransformer3DModel calls `name`."""
    return _translated(name, _inverse(_NAMES), _inverse(_BLOCK_NAMES))


def _translated(name: str, names: Mapping[str, str], block_names: Mapping[str, str]) -> str:
    place, rest = "", name
    if name.startswith("blocks.") and name.count(".") >= 2:
        _, number, rest = name.split(".", 2)
        place, names = f"blocks.{number}.", block_names
    for old, new in names.items():
        if rest == old or rest.startswith(f"{old}."):
            return place + new + rest.removeprefix(old)
    return name


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
