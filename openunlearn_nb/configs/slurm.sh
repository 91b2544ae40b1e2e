#!/bin/bash
# A grid on all GPUs of one node, a worker a GPU: for a model that fits one of them (openunlearn plan says whether). Copy this file, put your own in place
# of what is in capitals between the signs < and >, and submit it:
#   cp "$(openunlearn configs slurm)" grid.sh && sbatch grid.sh
# Cut off by the time limit or a node that fails? Submit it again: the grid goes on where it stopped.
#SBATCH --job-name=openunlearn
#SBATCH --account=<ACCOUNT>
#SBATCH --partition=<PARTITION>
#SBATCH --nodes=1
#SBATCH --ntasks=1                # one process starts the workers; no srun
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16        # two a GPU
#SBATCH --mem=256G                # a worker loads its model by way of the host's memory
#SBATCH --time=08:00:00
#SBATCH --output=openunlearn-%j.log
##SBATCH --array=0-2              # for B or C below: remove the first #
set -euo pipefail

source "<VENV>/bin/activate"
export HF_HOME="<SCRATCH>/huggingface" OPENUNLEARN_CACHE="<SCRATCH>/openunlearn"
# export HF_HUB_OFFLINE=1         # nodes without a network: download models and data beforehand
MODEL=Llama-3.2-1B-Instruct
DATA=locuslab/TOFU

# A. All splits and methods on this node. Small models: twice as many jobs, two share a GPU.
openunlearn tofu --model "$MODEL" --data "$DATA" --save-each epoch --jobs "$SLURM_GPUS_ON_NODE" --quiet --output runs/tofu

# B. Several nodes, a split each (--array=0-2). A folder takes one run at a time, so each task has its own.
#    When all are done: openunlearn table runs/tofu
# SPLITS=(forget01 forget05 forget10)
# SPLIT=${SPLITS[$SLURM_ARRAY_TASK_ID]}
# openunlearn tofu --model "$MODEL" --data "$DATA" --splits "$SPLIT" --save-each epoch --jobs "$SLURM_GPUS_ON_NODE" --quiet --output "runs/tofu/$SPLIT"

# C. A seed each; the table is then of means and spreads. (Not a method each: every task would measure Retain and Finetuned again, and a table
#    refuses two evaluations of one row.)
# SEED=$SLURM_ARRAY_TASK_ID
# openunlearn tofu --model "$MODEL" --data "$DATA" --seed "$SEED" --save-each epoch --jobs "$SLURM_GPUS_ON_NODE" --quiet --output "runs/seeds/seed$SEED"

# D. A model that does not fit one GPU: one cell after the other, each over two GPUs (--gpus-per-node=2), by ZeRO-3.
# accelerate launch --config_file "$(openunlearn configs zero3)" --num_processes 2 -m openunlearn_nb tofu --model Llama-2-7b-chat --data "$DATA" --save-each epoch --quiet --output runs/tofu-7b
