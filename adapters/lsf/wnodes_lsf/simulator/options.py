"""bsub's options and the names that they have in the parameter file (D: sub_exec_controls_enable)."""

VALUED = {
    "-J": "JOB_NAME",
    "-q": "QUEUE",
    "-i": "IN_FILE",
    "-o": "OUT_FILE",
    "-e": "ERR_FILE",
    "-R": "RES_REQ",
    "-E": "PRE_EXEC",
    "-Ep": "POST_EXEC",
    "-L": "LOGIN_SHELL",
    "-W": "RLIMIT_RUN",
    "-n": "NUM_PROCESSORS",
    "-M": "RLIMIT_RSS",
    "-P": "PROJECT_NAME",
    "-a": "ADDITIONAL",
    "-k": "CHKPNT_DIR",
    "-app": "APP",
    "-G": "USER_GROUP",
    "-m": "HOSTS",
    "-w": "DEPEND_COND",
    "-f": "OTHER_FILES",
}
FLAGS = {
    "-I": {"INTERACTIVE": "Y"},
    "-Ip": {"INTERACTIVE": "Y", "PTY": "Y"},
    "-Is": {"INTERACTIVE": "Y", "PTY": "Y", "PTY_SHELL": "Y"},
    "-x": {"EXCLUSIVE": "Y"},
    "-r": {"RERUNNABLE": "Y"},
    "-H": {"HOLD": "Y"},
    "-ar": {"AUTO_RESIZABLE": "Y"},
}
MORE = ("PTY_SHELL", "MAX_NUM_PROCESSORS", "RLIMIT_CPU", "CHKPNT_PERIOD", "COMMAND_LINE", "MODIFY")
KNOWN = frozenset((*VALUED.values(), *(name for flag in FLAGS.values() for name in flag), *MORE))
