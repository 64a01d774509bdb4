#!/bin/bash
#SBATCH --job-name=demo
# An ordinary batch script. Nothing in it knows of virtual machines.
echo "kernel $(uname -r) on $(hostname), $(id), in $PWD"
read -r greeting <input.txt
echo "input says: $greeting"
echo "$greeting, from $(hostname)" >output.txt
exit 3
