"""The model card and the record that lie beside every export: how to sample it, with what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trainer.student_facts import RECORD, Facts

CARD = "README.md"
_SCHEDULERS = {
    "renoise": "FlowMatchLCMScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_COMFYUI_SAMPLERS = {"renoise": "lcm", "euler": "euler", "unipc": "uni_pc"}


@dataclass(frozen=True)
class Exported:
    """What was written, as its card tells."""

    kind: Literal["adapter", "model"]
    files: list[str]  # names in its folder; of an adapter of two experts the high one's first
    layout: str  # of an adapter one of its layouts; of a model official, diffusers, or a naming
    dtype: str = "float32"
    rank: int | None = None  # of an adapter, the largest
    more: Mapping[str, Any] = field(default_factory=dict)  # figures, such as of an extraction


def texts(facts: Facts, exported: Exported) -> dict[str, str]:
    """The card and the record, by their names in a folder."""
    return {CARD: card(facts, exported), RECORD: record(facts, exported)}


def record(facts: Facts, exported: Exported) -> str:
    """What a program reads: all facts, and the calls that follow from them."""
    held = asdict(facts) | {
        "format": 1,
        "kind": exported.kind,
        "files": exported.files,
        "layout": exported.layout,
        "dtype": exported.dtype,
        "rank": exported.rank,
        "lora_strength": 1.0 if exported.kind == "adapter" else None,
        "diffusers": in_diffusers(facts, exported),
        "comfyui": in_comfyui(facts, exported),
        **exported.more,
    }
    return json.dumps(held, indent=1) + "\n"


def card(facts: Facts, exported: Exported) -> str:
    """A page for people, with the header that hubs read."""
    lora = exported.kind == "adapter"
    title = f"{facts.base}, {facts.steps} steps{', as an adapter' if lora else ''}"
    parts = [_front_matter(facts, exported), f"# {title}\n", _sentence(facts, exported)]
    parts += ["| setting | value |\n| --- | --- |\n" + "\n".join(_rows(facts, exported)) + "\n"]
    code = in_diffusers(facts, exported)
    if code is not None:
        parts.append(f"## In diffusers\n\n```python\n{code}```\n")
    line = in_comfyui(facts, exported)
    if line is not None:
        parts.append(f"## In ComfyUI\n\n{line}\n")
    parts.append(f"## Here\n\n```\n{_here(exported)}\n```\n")
    return "\n".join(parts)


def _front_matter(facts: Facts, exported: Exported) -> str:
    lora = exported.kind == "adapter"
    lines = [
        f"license: {facts.licence}",
        f"base_model: {hub_name(facts.base)}",
        f"base_model_relation: {'adapter' if lora else 'finetune'}",
        f"pipeline_tag: {'image-to-video' if facts.images else 'text-to-video'}",
        "library_name: diffusers",
        f"tags: [{'lora, ' if lora else ''}few-step, distillation, wan]",
    ]
    return "---\n" + "\n".join(lines) + "\n---\n"


def _sentence(facts: Facts, exported: Exported) -> str:
    how = "guidance off" if facts.cfg_scale == 1.0 else f"guidance {facts.cfg_scale:g}"
    what = f"an adapter for {facts.base}" if exported.kind == "adapter" else f"made of {facts.base}"
    if facts.first_block_sigmas is not None:
        what += f" (its first block in {len(facts.first_block_sigmas)} steps)"
    which = "A student that needs" if facts.sigmas else "A model that is sampled in"
    return f"{which} {facts.steps} steps with {how}: {what}, trained by Fewstep.\n"


def _rows(facts: Facts, exported: Exported) -> list[str]:
    rows: dict[str, object] = {
        "steps": facts.steps,
        "noise levels": _levels(facts.sigmas) or None,
        "noise levels of the first block": facts.first_block_sigmas
        and _levels(facts.first_block_sigmas),
        "shift": f"{facts.shift:g}",
        "guidance (cfg_scale)": f"{facts.cfg_scale:g}",
        "guidance of the low-noise expert": facts.cfg_scale_low,
        "boundary between the experts": facts.boundary and f"{facts.boundary:.4f}",
        "expert": facts.expert and f"the one of {facts.expert} noise levels",
        "between steps": "predict the clean clip, add fresh noise"
        if facts.sampler == "renoise"
        else facts.sampler,
        "LoRA strength": 1.0 if exported.kind == "adapter" else None,
        "rank": exported.rank,
        "clips": facts.height
        and f"{facts.height} x {facts.width}, {facts.frames} frames, {facts.fps:g} per second",
        "causal (frame block by frame block)": "yes" if facts.causal else None,
        "last layer": "one per step (head.bank), each the mean of those of the steps it stands for"
        if facts.head_per_step
        else None,
        "method": facts.method,
        "base": f"{facts.base}" + (f", sha256 {facts.base_sha256}" if facts.base_sha256 else ""),
        "files": ", ".join(exported.files) or None,
        "layout, precision": f"{exported.layout}, {exported.dtype}",
    }
    return [f"| {name} | {value} |" for name, value in rows.items() if value is not None]


def _levels(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4f}" for sigma in sigmas)


def hub_name(base: str) -> str:
    """Where diffusers finds a released base; any other is a folder of that name."""
    if not base.startswith("Wan2.") or "Tiny" in base:
        return base
    name = base if base.lower().endswith("-diffusers") else f"{base}-Diffusers"
    return f"Wan-AI/{name}"


def in_diffusers(facts: Facts, exported: Exported) -> str | None:
    """Python that samples it with diffusers as it is sampled here; None = diffusers cannot."""
    if facts.head_per_step:
        return None  # its transformer has one last layer for all steps
    if facts.causal or (exported.kind == "model" and exported.layout != "diffusers"):
        return None
    pipeline = "WanImageToVideoPipeline" if facts.images else "WanPipeline"
    scheduler = _SCHEDULERS[facts.sampler]
    base = repr(hub_name(facts.base)) if exported.kind == "adapter" else '"."'
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted((scheduler, pipeline)))}",
        "",
        f"pipe = {pipeline}.from_pretrained({base}, torch_dtype=torch.bfloat16)",
        *_loading(exported),
        *_scheduling(facts, scheduler),
    ]
    if facts.boundary is not None:
        lines.append(f"pipe.register_to_config(boundary_ratio={facts.boundary!r})")
    lines += ["pipe.to('cuda')", *_calling(facts)]
    return "\n".join(lines) + "\n"


def _loading(exported: Exported) -> list[str]:
    if exported.kind == "model":
        return []
    calls = []
    for file in exported.files:
        second = ", load_into_transformer_2=True" if file.startswith("low_noise") else ""
        calls.append(
            f"pipe.load_lora_weights('.', weight_name={file!r}, adapter_name='few'{second})"
        )
    return calls


def _scheduling(facts: Facts, scheduler: str) -> list[str]:
    """The scheduler, held to the noise levels that the student was trained at."""
    if not facts.sigmas:
        settings = f"shift={facts.shift:g}"
        if scheduler == "UniPCMultistepScheduler":
            settings = (
                f"prediction_type='flow_prediction', use_flow_sigmas=True, "
                f"flow_shift={facts.shift:g}"
            )
        return ["", f"pipe.scheduler = {scheduler}({settings})"]
    levels = ", ".join(f"{sigma:.10g}" for sigma in facts.sigmas)
    return [
        "",
        "",
        f"class FewSteps({scheduler}):",
        "    def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):",
        f"        super().set_timesteps(sigmas=[{levels}], device=device)",
        "",
        "",
        "pipe.scheduler = FewSteps(shift=1.0)  # the levels above are shifted already",
    ]


def _calling(facts: Facts) -> list[str]:
    size = []
    if facts.height is not None:
        size = [f"    height={facts.height},", f"    width={facts.width},"]
        size += [f"    num_frames={facts.frames},"]
    guidance = [f"    guidance_scale={facts.cfg_scale!r},"]
    if facts.cfg_scale_low is not None:
        guidance.append(f"    guidance_scale_2={facts.cfg_scale_low!r},")
    return [
        "torch.manual_seed(0)  # of the noise between steps",
        "frames = pipe(",
        *(["    image=image,  # a PIL image"] if facts.images else []),
        "    prompt=prompt,",
        *size,
        f"    num_inference_steps={facts.steps},",
        *guidance,
        ").frames[0]",
    ]


def in_comfyui(facts: Facts, exported: Exported) -> str | None:
    """The settings of ComfyUI's nodes, in a line; None = it cannot sample this."""
    if facts.causal or facts.head_per_step:
        return None
    sampler = _COMFYUI_SAMPLERS[facts.sampler]
    common = (
        f"ModelSamplingSD3 shift {facts.shift:g}; KSampler: steps {facts.steps}, "
        f"cfg {facts.cfg_scale:g}, sampler {sampler}, scheduler simple"
    )
    if facts.boundary is not None and facts.sigmas:
        high = sum(sigma >= facts.boundary for sigma in facts.sigmas)
        common = common.replace("KSampler:", "two KSampler (Advanced):") + (
            f"; high-noise model steps 0 to {high}, low-noise model from {high}"
        )
    if exported.kind == "model":
        return f"{common}."
    naming = "" if exported.layout != "diffusers" else " (export it with --adapter_layout comfyui)"
    return f"LoraLoaderModelOnly strength 1.0{naming}; {common}."


def _here(exported: Exported) -> str:
    where = "--adapter ." if exported.kind == "adapter" else "--checkpoint_path ."
    line = "python inference.py --config_path CONFIG --checkpoint_path BASE --adapter ."
    if exported.kind == "model":
        line = f"python inference.py --config_path CONFIG {where}"
    return f"{line} --data_path PROMPTS --output_folder CLIPS"
