#!/usr/bin/env bash
# Every table and picture of the README, each made by one command and copied into assets/; the times are of two
# cores without a GPU. Type it at the top of the repository, whole or a line of it; after a kill again.
#   the games: pip install alfworld && alfworld-download
#   SMOLLM: a folder with SmolLM2-135M-Instruct, or its hub id
set -e
SMOLLM=${SMOLLM:-HuggingFaceTB/SmolLM2-135M-Instruct}
cd "$(dirname "$0")/.."

# keep RESULT NAME: a result of an output folder becomes assets/NAME
keep() { cp -r "$1" "assets/$2"; }

python examples/household.py                                      # 5 minutes
keep household_out/summary.json household.json && keep household_out/results.png household.png
python examples/arithmetic.py                                     # 3 minutes
keep arithmetic_out/summary.json arithmetic.json && keep arithmetic_out/results.png arithmetic.png
python examples/unsure.py --all --seeds 0 1 2                     # 3 hours
keep unsure_out/unsure.json unsure.json && keep unsure_out/unsure.png unsure.png

python examples/alfworld_small.py --seeds 0 1 2                   # 2 hours a seed
keep alfworld_out/alfworld.json alfworld.json && keep alfworld_out/alfworld.png alfworld.png
rm -rf assets/models && keep alfworld_out/seed0/box models        # what the README's "One message by hand" loads
python examples/alfworld_small.py --unsure --seeds 0 1 2          # 5 hours a seed
keep alfworld_out/unsure/unsure_games.json unsure_games.json
keep alfworld_out/unsure/unsure_games.png unsure_games.png
python examples/alfworld_small.py --actor_knows 0 0.5 1           # 2 hours
keep alfworld_out/actor_knows/actor_knows.json actor_knows.json
keep alfworld_out/actor_knows/actor_knows.png actor_knows.png

python examples/smollm2.py --model "$SMOLLM" --bf16 true          # 5 hours
keep smollm2_out/smollm2.json smollm2.json
python examples/warmup.py --smollm2 smollm2_out                   # 15 minutes
keep warmup_out/warmup.json warmup.json && keep warmup_out/warmup.png warmup.png
python examples/alignments.py                                     # 3 hours
keep alignments_out/alignments.json alignments.json && keep alignments_out/alignments.png alignments.png

OMP_NUM_THREADS=2 python examples/bench.py all --json assets/performance.json   # 20 minutes, on an idle machine
