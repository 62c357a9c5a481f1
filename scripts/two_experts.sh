#!/usr/bin/env bash
# From nothing to a 4-step student of two experts on the tiny world: both teachers, both phases, and
# what either makes. Every stage is a command that works on its own and continues where it was
# interrupted. scripts/quickstart.sh does the same for one network, and installs.
#
# usage: bash scripts/two_experts.sh [--smoke] [--seed N] [--output_folder DIR]
set -euo pipefail

smoke=0 seed=0 out=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke) smoke=1; shift ;;
        --seed) seed=${2:?--seed needs a number}; shift 2 ;;
        --output_folder) out=${2:?--output_folder needs a path}; shift 2 ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument '$1'; allowed: --smoke, --seed N, --output_folder DIR" >&2
           exit 2 ;;
    esac
done
out=${out:-runs/two_experts-seed$seed}
folder=$out/wan_models/Wan2.2-T2V-A14B-Tiny
shared=("model_root=$out/wan_models" "seed=$seed")
teacher=("data.path=$out/data/latents") student=("data.path=$out/data/prompts.txt")
clips=8192 judged=192
if [ "$smoke" = 1 ]; then
    clips=256 judged=8
    teacher+=(steps=8 save_every=4)
    student+=(steps=6 save_every=3 validation.every=0)
fi
mkdir -p "$out"

python scripts/make_tiny_world.py \
    --model_root "$out/wan_models" --data_path "$out/data" --clips "$clips"
for side in high low; do
    python train.py --config_path "configs/tiny/a14b_diffusion_$side.yaml" \
        --logdir "$out/teacher_$side" "${shared[@]}" "${teacher[@]}"
    python convert_checkpoint.py --input_path "$out/teacher_$side" --use_ema --overwrite \
        --output_path "$folder/${side}_noise_model/diffusion_pytorch_model.safetensors"
done
python train.py --config_path configs/tiny/phased_dmd_high.yaml --logdir "$out/student_high" \
    "${shared[@]}" "${student[@]}"
python convert_checkpoint.py --input_path "$out/student_high" --use_ema --overwrite \
    --output_path "$out/student_high.safetensors"
student+=("generator.weights_high=$out/student_high.safetensors")
python train.py --config_path configs/tiny/phased_dmd_low.yaml --logdir "$out/student" \
    "${shared[@]}" "${student[@]}"
python scripts/evaluate.py --output_folder "$out/evaluation" --clips "$judged" --seed "$seed" \
    --teacher_config configs/tiny/a14b_diffusion.yaml --teacher_path "$folder" \
    --student_config "$out/student/config.yaml" --student_path "$out/student" "${shared[@]}"
