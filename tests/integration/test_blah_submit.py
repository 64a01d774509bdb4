"""Grid jobs: the real submission scripts of HTCondor's blahp, with our attributes, into real VMs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import slurm_site
from wnodes_htcondor import debs
from wnodes_lsf.testing import Site, until

pytestmark = [pytest.mark.lsf, pytest.mark.slurm, pytest.mark.guest]
HOOKS = Path(__file__).parents[2] / "hooks/blah"
CONFIG = """\
supported_lrms={lrms}
lsf_binpath={bin}
lsf_confpath={conf}
lsf_nologaccess=yes
lsf_nochecksubmission=yes
slurm_binpath=/usr/bin
blah_shared_directories=/
"""


def blahp(folder: Path, lrms: str, **where: object) -> dict[str, str]:
    """A private blahp beside the site: HTCondor's scripts, our attributes; the environment that it runs in."""
    location = folder / "blahp"
    shutil.copytree(debs.prefix("23") / "usr/libexec/blahp", location / "libexec/blahp", ignore=shutil.ignore_patterns("*_attributes.sh"))
    name = f"{lrms}_local_submit_attributes.sh"
    shutil.copy(HOOKS / name, location / "libexec/blahp" / name)
    (location / "bin").mkdir()
    config = location / "blah.config"
    config.write_text(CONFIG.format(lrms=lrms, **where))
    return {"BLAHPD_LOCATION": str(location), "BLAHPD_CONFIG_LOCATION": str(config)}


def submit(site: Any, lrms: str, environ: dict[str, str], wish: str, **how: Any) -> Any:
    """As blahpd does: the requirements as variables in a file, the job's program and output."""
    wishes = site.work / "wish"
    wishes.write_text(wish)
    script = f"{environ['BLAHPD_LOCATION']}/libexec/blahp/{lrms}_submit.sh"
    program = site.work / "job.sh"
    program.write_text("#!/bin/sh\nuname -r; id -un\n")
    program.chmod(0o755)
    argv = [script, "-c", str(program), "-o", str(site.work / "grid-out"), "-e", str(site.work / "grid-err"), "-C", str(wishes)]
    words = [f"{name}={value}" for name, value in environ.items()]
    return site.run_as(["env", *words, *argv, "-w", str(site.work)], check=False, **how)


def look_at(site: Any, done: Any) -> None:
    out = site.work / "grid-out"
    until(lambda: out.exists() and out.read_text().count("\n") == 2, lambda: f"{done} {site.log()[-3000:]}", 120)
    release, user = out.read_text().split()
    assert release.endswith("-cloud-amd64") and user == site.user


def test_a_grid_job_through_blah_runs_in_a_vm_under_lsf(minimal_image):
    # BLAH calls bsub from the home folder: that is the job's, and the sandbox has to be mounted by the site.
    with Site(minimal_image, settings="policy: [{mounts: [/var/tmp]}]") as site:
        site.install(login=True)
        environ = blahp(site.folder, "lsf", bin=site.lab.bindir, conf=site.lab.envdir)
        refused = submit(site, "lsf", environ, "WnodesImage='debian12; touch x'\n")
        assert refused.exit_code == 1 and b"image '-'" in refused.stderr, refused
        done = submit(site, "lsf", environ, "WnodesImage='debian12'\nWnodesCpus='1'\n")
        assert b"BLAHP_JOBID_PREFIXlsf/" in done.stdout, done
        look_at(site, done)
        site.assert_nothing_left()


def test_a_grid_job_through_blah_runs_in_a_vm_under_slurm(minimal_image):
    with slurm_site.Site(minimal_image, "g") as site:
        environ = blahp(site.folder, "slurm", bin="/usr/bin", conf="/etc") | {"SLURM_CONF": str(site.lab.conf)}
        refused = submit(site, "slurm", environ, "WnodesImage='debian12; touch x'\n")
        assert refused.exit_code == 1 and b"--vm-image" in refused.stderr, refused
        done = submit(site, "slurm", environ, "WnodesImage='debian12'\n")
        assert b"BLAHP_JOBID_PREFIXslurm/" in done.stdout, done
        look_at(site, done)
        site.assert_nothing_left()
