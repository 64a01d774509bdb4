"""A protocol simulator of LSF, for tests: what LSF does to its hooks, on one host, as real processes.

Written from the contract alone (the marks: D documented by IBM for 10.1, T observed on a GPL descendant
of LSF 4.2, M from memory), not from the adapter. Where D and T differ, ``LSB_SIM_RELEASE`` in lsf.conf
chooses: ``T`` (default) or ``D``. It schedules nothing worth the name and secures nothing: root runs it
on unix sockets in a folder of its own, and ordinary users submit.

========== ===========================================================================================
bsub …     the user's programs: esubs run here, as the user (D/T)
mbatchd    queues and jobs, in memory
sbatchd    starts jobs, signals them, reports their ends; may be killed and started again
res        the job's root process: uid of the user, leader of its group; runs the job file (T)
========== ===========================================================================================
"""
