"""What we add to HTCondor's configuration, and why. Text only.

Contract (HTCondor manual, "Introduction to Configuration" and "Configuration Macros"; measured on
23.9.6 and 25.14.1): files of LOCAL_CONFIG_DIR are read in the order of their names, a later line wins.
"""

from __future__ import annotations

# An execution point. @…@ are filled in by install.py.
EXECUTE = """\
# wnodes, execution point: `vm_image = NAME` jobs run in their own VM. wnodes htcondor install --uninstall removes this.
SINGULARITY = @PREFIX@/runtime
WNODES_SITE_SINGULARITY = @APPTAINER@
SINGULARITY_JOB = (!isUndefined(TARGET.VM_Image) || !isUndefined(TARGET.VM)) || ($(SINGULARITY_JOB:False))
SINGULARITY_IMAGE_EXPR = ifThenElse(isUndefined(TARGET.VM_Image) && isUndefined(TARGET.VM), \\
    $(SINGULARITY_IMAGE_EXPR:TARGET.SingularityImage), \\
    strcat("wnodes:", ifThenElse(isUndefined(TARGET.VM_Image), "vm", TARGET.VM_Image)))
# The VM's processes are found by their real pids.
SINGULARITY_USE_PID_NAMESPACES = False
# So many VMs this host may run at a time: counted by the startd, where an advertised number would be stale.
MACHINE_RESOURCE_WnodesVM = @VMS@
STARTD_CRON_JOBLIST = $(STARTD_CRON_JOBLIST) WNODES
STARTD_CRON_WNODES_EXECUTABLE = @PREFIX@/advertise
STARTD_CRON_WNODES_MODE = Periodic
STARTD_CRON_WNODES_PERIOD = @PERIOD@
STARTD_CRON_WNODES_RECONFIG_RERUN = True
STARTD_CRON_WNODES_KILL = True
# condor_ssh_to_job: sshd runs on the host; of a VM job it leads into the VM.
SSH_TO_JOB_SSHD_CONFIG_TEMPLATE = @PREFIX@/sshd_config
"""
# Where no apptainer stands behind ours, container jobs are kept away.
NO_APPTAINER = """\
HasSingularity = False
HasContainer = False
STARTD_ATTRS = $(STARTD_ATTRS) HasSingularity HasContainer
"""

IMAGE_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}(:[A-Za-z0-9][A-Za-z0-9._-]{0,62})?(@sha256:[0-9a-f]{64})?$"
# The grammar in outline: known keys, a comma within a value behind a backslash. What it lets through
# the node still checks.
_KEY = "(image|cpus|memory|scratch|network|mount|start|trace)"
_ITEM = rf"{_KEY}=([^,\\]|\\.)+"
VM_PATTERN = f"^{_ITEM}(,{_ITEM})*$"

# An access point. The expressions that end a run are bound to that run by its number, so that none of
# them can hold or requeue a later one.
SUBMIT = """\
# wnodes, access point: `vm_image = NAME` in submit files. wnodes htcondor install --uninstall removes this.
EXTENDED_SUBMIT_COMMANDS @=end
$(EXTENDED_SUBMIT_COMMANDS)
  vm_image = "name"
  vm = "image=name,cpus=1"
@end
SUBMIT_REQUIREMENT_NAMES = $(SUBMIT_REQUIREMENT_NAMES) WnodesImage WnodesVm WnodesUniverse
SUBMIT_REQUIREMENT_WnodesImage = VM_Image is undefined || regexp("@IMAGE_PATTERN@", VM_Image) is true
SUBMIT_REQUIREMENT_WnodesImage_REASON = strcat("wnodes: vm_image '", VM_Image, \\
    "': want NAME, NAME:TAG or NAME@sha256:DIGEST")
SUBMIT_REQUIREMENT_WnodesVm = VM is undefined || regexp("@VM_PATTERN@", VM) is true
SUBMIT_REQUIREMENT_WnodesVm_REASON = strcat("wnodes: vm '", VM, \\
    "': want KEY=VALUE[,KEY=VALUE...] with image, cpus, memory, scratch, network, mount, start or trace")
SUBMIT_REQUIREMENT_WnodesUniverse = (VM_Image is undefined && VM is undefined) || \\
    (JobUniverse == 5 && WantDocker isnt true && WantContainer isnt true)
SUBMIT_REQUIREMENT_WnodesUniverse_REASON = "wnodes: vm_image and vm: want universe = vanilla"
JOB_TRANSFORM_NAMES = $(JOB_TRANSFORM_NAMES) WnodesName Wnodes WnodesImage
JOB_TRANSFORM_WnodesName @=end
  REQUIREMENTS VM_Image is undefined && regexp("(^|,)image=[^,]", VM) is true
  EVALSET VM_Image regexps("(^|,)image=([^,]+)", VM, "\\\\2")
@end
JOB_TRANSFORM_Wnodes @=end
  REQUIREMENTS VM_Image isnt undefined || VM isnt undefined
  SET Requirements ($(MY.Requirements)) && TARGET.HasWnodes
  DEFAULT RequestWnodesVM 1
  SET WnodesOver ChirpWnodesRun isnt undefined && ChirpWnodesRun is NumShadowStarts
  SET WnodesHolds WnodesOver && ChirpWnodesHold isnt undefined
  SET OnExitHold ($(MY.OnExitHold:false)) || WnodesHolds
  SET OnExitHoldReason ifThenElse(WnodesHolds, ChirpWnodesHold, $(MY.OnExitHoldReason:undefined))
  SET OnExitHoldSubCode ifThenElse(WnodesHolds, ChirpWnodesCode, $(MY.OnExitHoldSubCode:0))
  SET OnExitRemove ($(MY.OnExitRemove:true)) && !(WnodesOver && ChirpWnodesAgain isnt undefined)
@end
JOB_TRANSFORM_WnodesImage @=end
  REQUIREMENTS VM_Image isnt undefined
  SET Requirements ($(MY.Requirements)) && member(MY.VM_Image, TARGET.WnodesImages)
@end
"""
