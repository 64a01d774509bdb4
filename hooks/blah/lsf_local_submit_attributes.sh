#!/bin/sh
# BLAH lsf_local_submit_attributes.sh: carries a grid job's wish for a VM (docs/grid.md). Sourced by blahp as the mapped
# user; every line printed goes into the submission. Users write the values, even IFS and PATH: no word of theirs is
# split, run or printed before it fits. What does not fit becomes "-", which esub refuses: blahp shows none of our errors.
wnodes_word() { case "$1" in *[!ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.:@_-]* | [!ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789]* | "") printf '%s' - ;; *) printf '%s' "$1" ;; esac; }
wnodes_image=${WnodesImage-} wnodes_name= wnodes_default=
[ -n "$wnodes_image" ] || [ ! -r /etc/wnodes/vo-images ] || while IFS=' ' read -r wnodes_name wnodes_default wnodes_rest; do
    case "$wnodes_name" in "${WnodesVO:-#}") [ "$wnodes_name" = "#" ] || wnodes_image=$wnodes_default ;; esac
done </etc/wnodes/vo-images
if [ -n "$wnodes_image${WnodesCpus-}${WnodesMemory-}" ]; then
    wnodes_all=${wnodes_image:+image=$(wnodes_word "$wnodes_image")}${WnodesCpus:+,cpus=$(wnodes_word "$WnodesCpus")}
    wnodes_all=$wnodes_all${WnodesMemory:+,memory=$(wnodes_word "$WnodesMemory")}
    printf '#BSUB -a "wnodes(%s)"\n' "${wnodes_all#,}"
fi
