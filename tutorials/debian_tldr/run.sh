#!/bin/bash
# The runs of ../debian_tldr.md, one function each: bash tutorials/debian_tldr/run.sh MODEL DATA RUNS STEP…
# MODEL: SmolLM2-135M-Instruct; DATA: a folder with debian_tldr/ and hh_harmless/; RUNS: where everything goes.
# STEP: in this order before sft reward judge hh curve doctor-before frontier predict inspect doctor-after winrate
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL=$1 D=$2/debian_tldr H=$2/hh_harmless RUNS=$3
shift 3
mkdir -p "$RUNS/configs" "$RUNS/time"
for s in sft reward ppo best_of_n; do sed "s#runs/local#$RUNS#; s/every_n_train_steps: .*/every_n_train_steps: 32/" configs/local/$s.yaml >"$RUNS/configs/$s.yaml"; done
for s in judge hh; do sed "s#$RUNS/reward#$RUNS/$s#" "$RUNS/configs/reward.yaml" >"$RUNS/configs/$s.yaml"; done

COMMON="--data.max_prompt_tokens 96 --data.limit_val_rows 200 --trainer.num_sanity_val_steps 0 --trainer.precision bf16-mixed"
TLDR="--data.data $D/tldr_train.jsonl.gz --data.val_data $D/tldr_valid.jsonl.gz $COMMON"
PAIRS="--data.val_data $D/comparisons_valid.jsonl.gz $COMMON"
HALF="--model.frozen_layers 20 --data.batch_size 16 --model.optimizer.init_args.lr 5e-5 --model.scheduler.init_args.warmup_steps 4"
WRITE="--model.sampling.max_new_tokens 24"
PPO="--config $RUNS/configs/ppo.yaml $TLDR $WRITE --data.limit_train_rows 2000 --model.batch_size 64 --model.responses_per_prompt 4
  --model.ppo_epochs 2 --model.frozen_layers 20 --model.kl_coef 0.02 --model.optimizer.init_args.lr 1e-4 --model.value_lr 1e-4
  --trainer.max_epochs 32 --trainer.check_val_every_n_epoch 1000"

timed() { # NAME COMMAND…: what it cost goes to $RUNS/time/NAME
  local name=$1
  shift
  /usr/bin/time -v -o "$RUNS/time/$name" lit-rlhf "$@"
}
before() { timed before validate --config "$RUNS/configs/sft.yaml" --model.model "$MODEL" $TLDR $WRITE --trainer.default_root_dir "$RUNS/before"; }
sft() {
  timed sft fit --config "$RUNS/configs/sft.yaml" --model.model "$MODEL" $TLDR $WRITE --data.limit_train_rows 2048 --data.batch_size 16 \
    --trainer.val_check_interval 1.0 --model.optimizer.init_args.lr 1e-4 --model.scheduler.init_args.warmup_steps 8
}
reward() {
  local pairs="--config $RUNS/configs/reward.yaml --data.data $D/comparisons_train.jsonl.gz $PAIRS"
  timed reward fit $pairs $HALF --data.limit_train_rows 768 --trainer.limit_val_batches 0 --model.reference_rows 128
  timed report test $pairs --model.model "$RUNS/reward/hf" --data.test_data "$D/comparisons_valid.jsonl.gz" --data.limit_val_rows 320
}
judge() { # a second reward model, trained on pairs that the first has not seen
  zcat "$D/comparisons_train.jsonl.gz" | tail -n 600 >"$RUNS/judge_pairs.jsonl"
  timed judge fit --config "$RUNS/configs/judge.yaml" --data.data "$RUNS/judge_pairs.jsonl" $PAIRS $HALF --data.limit_train_rows 512 \
    --trainer.val_check_interval 1.0 --model.reference_rows 64
}
hh() {
  local pairs="--config $RUNS/configs/hh.yaml --data.data $H/train.jsonl.gz --data.val_data $H/valid.jsonl.gz $COMMON --data.overlong left
    --data.max_prompt_tokens 128 --data.limit_val_rows 273"
  timed hh fit $pairs --model.model "$MODEL" $HALF --trainer.limit_val_batches 0 --model.reference_rows 128
  timed hh_report test $pairs --model.model "$RUNS/hh/hf" --data.test_data "$H/valid.jsonl.gz"
}
curve() {
  timed curve learning-curve --config "$RUNS/configs/reward.yaml" --data.data "$D/comparisons_train.jsonl.gz" $PAIRS $HALF \
    --sizes 64 192 576 --out "$RUNS/learning_curve"
}
doctor() { # NAME MORE…: 1 where something failed
  local name=$1
  shift
  timed "$name" doctor --base "$MODEL" --sft "$RUNS/sft/hf" --reward "$RUNS/reward/hf" --rows 24 --max_new_tokens 24 --max_prompt_tokens 96 \
    --data "$D"/{tldr,comparisons}_{train,valid}.jsonl.gz --out "$RUNS/$name" "$@" >"$RUNS/$name.txt" || true
}
frontier() {
  timed frontier frontier $PPO --gold tutorials.debian_tldr.rewards.rouge --every 8 --best_of 16 --data.limit_val_rows 48 \
    --out "$RUNS/frontier"
}
predict() { # what SFT and PPO write to the same posts, with the same noise; what the maintainers wrote
  timed predict_sft predict $PPO --data.limit_val_rows 100 --trainer.default_root_dir "$RUNS/predictions/sft"
  timed predict_ppo predict $PPO --data.limit_val_rows 100 --trainer.default_root_dir "$RUNS/predictions/ppo" --ckpt_path "$RUNS/frontier/as_configured/checkpoints/last.ckpt"
  mkdir -p "$RUNS/predictions/maintainer"
  python -c 'import json, sys
for line in open(sys.argv[1]): print(json.dumps(json.loads(line) | {"response": json.loads(line)["reference"]}))' \
    "$RUNS/predictions/sft/predictions.jsonl" >"$RUNS/predictions/maintainer/predictions.jsonl"
}
winrate() {
  local a b
  for a in ppo-sft ppo-maintainer sft-maintainer; do
    b=${a#*-} a=${a%-*}
    timed "winrate_$a-$b" winrate "$RUNS/predictions/$a/predictions.jsonl" "$RUNS/predictions/$b/predictions.jsonl" --out "$RUNS/winrate/$a-$b" \
      --judge "$RUNS/reward/hf" "$RUNS/judge/hf" "$MODEL" tutorials.debian_tldr.rewards.rouge --dtype bfloat16
  done
}
inspect() { # the last policy and its value network, from the checkpoint, on a held-out post
  timed export fit $PPO --trainer.default_root_dir "$RUNS/export" --ckpt_path "$RUNS/frontier/as_configured/checkpoints/last.ckpt"
  timed inspect inspect --policy "$RUNS/ppo/hf/policy" --value "$RUNS/ppo/hf/value" --reference "$RUNS/sft/hf" --reward "$RUNS/reward/hf" \
    --data "$D/tldr_valid.jsonl.gz" --row 4 --max_new_tokens 24 --kl_coef 0.02 --out "$RUNS/inspect"
}
for step in "$@"; do
  case $step in
    doctor-before) doctor doctor_before ;;
    doctor-after) doctor doctor_after --policy "$RUNS/ppo/hf/policy" ;;
    *) $step ;;
  esac
done
