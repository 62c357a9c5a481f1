#!/usr/bin/env bash
# From nothing to a 4-step student on the tiny world: install, make the world, train the teacher,
# distil it, sample, evaluate, report. Every stage is a command that works on its own, and continues
# where it was interrupted: run this again and nothing is done twice.
#
# usage: bash scripts/quickstart.sh [--smoke] [--seed N] [--output_folder DIR]
#   --smoke          the same in miniature, to test the plumbing: the figures mean nothing
#   --seed N         of training and evaluation (default 0)
#   --output_folder  default runs/quickstart (runs/smoke with --smoke; -seedN is added for N > 0)
set -euo pipefail

smoke=0 seed=0 out=""
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke) smoke=1; shift ;;
        --seed)
            seed=${2:?--seed needs a number}; shift 2
            case "$seed" in
                *[!0-9]* | ????????????????*)
                    echo "error: --seed $seed: must be a whole number of at most 15 digits" >&2
                    exit 2 ;;
            esac ;;
        --output_folder) out=${2:?--output_folder needs a path}; shift 2 ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument '$1'; allowed: --smoke, --seed N, --output_folder DIR" >&2
           exit 2 ;;
    esac
done

# shellcheck source=scripts/setup_venv.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh" report
export TOKENIZERS_PARALLELISM=false
name=quickstart
[ "$smoke" = 1 ] && name=smoke
[ "$seed" != 0 ] && name="$name-seed$seed"
out=${out:-runs/$name}
mkdir -p "$out"

shared=("model_root=$out/wan_models" "seed=$seed")
teacher=("data.path=$out/data/latents") student=("data.path=$out/data/prompts.txt")
clips=8192 judged=192
if [ "$smoke" = 1 ]; then
    clips=256 judged=16
    teacher+=(steps=40 save_every=20 validation.every=40)
    student+=(steps=12 save_every=6 validation.every=12)
fi

stage() { # stage NAME COMMAND...: run a command, and note how long it took
    local stage_name=$1 begin=$SECONDS
    shift
    printf '\n== %s\n   %s\n' "$stage_name" "$*"
    "$@"
    echo "{\"stage\": \"$stage_name\", \"seconds\": $((SECONDS - begin))}" >>"$out/timings.jsonl"
}

weights=$out/wan_models/Wan2.1-T2V-Tiny/diffusion_pytorch_model.safetensors
stage "tiny world" python scripts/make_tiny_world.py \
    --model_root "$out/wan_models" --data_path "$out/data" --clips "$clips"
stage "teacher" python train.py --config_path configs/tiny/diffusion.yaml \
    --logdir "$out/teacher" "${shared[@]}" "${teacher[@]}"
stage "release the teacher" python convert_checkpoint.py \
    --input_path "$out/teacher" --output_path "$weights" --use_ema --overwrite
stage "student" python train.py --config_path configs/tiny/dmd.yaml \
    --logdir "$out/student" "${shared[@]}" "${student[@]}"
stage "sample" python inference.py --config_path configs/tiny/dmd.yaml \
    --checkpoint_path "$out/student" --use_ema --data_path prompts/tiny.txt \
    --output_folder "$out/videos" --num_samples 2 --fps 8 "${shared[@]}" "${student[@]}"
stage "evaluate" python scripts/evaluate.py --output_folder "$out/evaluation" \
    --teacher_config configs/tiny/diffusion.yaml --teacher_path "$out/teacher" \
    --student_config configs/tiny/dmd.yaml --student_path "$out/student" \
    --clips "$judged" --seed "$seed" "${shared[@]}"
stage "report" python scripts/report.py --run_folder "$out"

cat <<MESSAGE

Done. Look at      $out/report.html
Figures            $out/summary.json
Clips              $out/videos
Open the demo with
    . .venv/bin/activate
    python demo.py --config_path configs/tiny/dmd.yaml --checkpoint_path $out/student --use_ema \\
        --fps 8 ${shared[*]} ${student[*]}
MESSAGE
