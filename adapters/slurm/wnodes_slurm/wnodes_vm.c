/* wnodes_vm: SPANK plug-in that gives sbatch, srun and salloc --vm-image=NAME, --vm=REQUEST and
 * --vm-start=KIND, and puts the launcher in front of every task of a job that has a marker on this node.
 *
 * plugstack.conf:  required wnodes_vm.so run=LAUNCHER state=FOLDER
 *
 * It holds no policy and parses no request. The marker FOLDER/JOBID.NODE, written by the Prolog
 * into a folder that only root can write, decides; what the user sets or unsets cannot.
 * Contract read: spank(7) of Slurm 22.05; 23.11 for spank_prepend_task_argv().
 */
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/slurm_version.h>
#include <slurm/spank.h>

SPANK_PLUGIN(wnodes_vm, 1);

static char image[256]; /* NAME:TAG@sha256:DIGEST is 200 at most */
static char request[8192]; /* two paths of 4095 bytes are the longest sensible mount */
static const char *start = "";


static int set_image(int val, const char *text, int remote)
{
	size_t length = text ? strlen(text) : 0;
	(void) val;
	(void) remote;
	if (!length || length >= sizeof image || !isalnum((unsigned char) text[0]) ||
	    strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:@-") != length) {
		slurm_error("wnodes: --vm-image '%.80s': want NAME, NAME:TAG or NAME@sha256:DIGEST", text ? text : "");
		return -1;
	}
	memcpy(image, text, length + 1);
	return 0;
}

static int set_request(int val, const char *text, int remote)
{
	size_t length = text ? strlen(text) : 0;
	(void) val;
	(void) remote;
	if (!length || length >= sizeof request || !strchr(text, '=')) {
		slurm_error("wnodes: --vm '%.80s': want KEY=VALUE[,KEY=VALUE...] of at most %zu bytes",
			    text ? text : "", sizeof request - 1);
		return -1;
	}
	for (size_t i = 0; i < length; i++)
		if (iscntrl((unsigned char) text[i])) {
			slurm_error("wnodes: --vm: control character at byte %zu: want printable text", i);
			return -1;
		}
	memcpy(request, text, length + 1);
	return 0;
}

static int set_start(int val, const char *text, int remote)
{
	static const char *const kinds[] = { "auto", "warm", "cold" };
	(void) val;
	(void) remote;
	for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
		if (text && !strcmp(text, kinds[i])) {
			start = kinds[i];
			return 0;
		}
	slurm_error("wnodes: --vm-start '%.80s': want auto, warm or cold", text ? text : "");
	return -1;
}

static struct spank_option options[] = {
	{ "vm-image", "NAME", "run this job in its own virtual machine, made from image NAME", 1, 0, set_image },
	{ "vm", "REQUEST", "the same with details: image=NAME,cpus=N,memory=8G,mount=SRC:DST:ro", 1, 0, set_request },
	{ "vm-start", "KIND", "how the VM comes up: auto, warm (a clone of a booted one) or cold", 1, 0, set_start },
};

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	(void) ac;
	(void) av;
	for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
		if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

/* Client side: the Prolog and Epilog see these as SPANK_VM_IMAGE, SPANK_VM and SPANK_VM_START. */
int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{
	(void) ac;
	(void) av;
	if (spank_remote(sp))
		return 0;
	if (image[0] && spank_job_control_setenv(sp, "VM_IMAGE", image, 1) != ESPANK_SUCCESS)
		return -1;
	if (request[0] && spank_job_control_setenv(sp, "VM", request, 1) != ESPANK_SUCCESS)
		return -1;
	if (start[0] && spank_job_control_setenv(sp, "VM_START", start, 1) != ESPANK_SUCCESS)
		return -1;
	return 0;
}

/* Is there a root-owned file FOLDER/JOBID.*? Whatever the node: SLURMD_NODENAME is only a
 * variable, and the launcher asks wnodesd, which knows the node, before anything runs. */
static int marked(const char *state, uint32_t job)
{
	char prefix[16];
	int found = 0, length = snprintf(prefix, sizeof prefix, "%u.", job);
	DIR *folder = opendir(state);
	struct dirent *entry;
	struct stat st;
	while (folder && !found && (entry = readdir(folder)))
		found = !strncmp(entry->d_name, prefix, (size_t) length) &&
			!fstatat(dirfd(folder), entry->d_name, &st, AT_SYMLINK_NOFOLLOW) &&
			S_ISREG(st.st_mode) && st.st_uid == 0;
	if (folder)
		closedir(folder);
	return found;
}

/* Node side, as the user, in every task of batch, srun and interactive steps. */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	static char run[512], state[512];
	uint32_t job, step;
	for (int i = 0; i < ac; i++) {
		if (!strncmp(av[i], "run=", 4))
			snprintf(run, sizeof run, "%s", av[i] + 4);
		if (!strncmp(av[i], "state=", 6))
			snprintf(state, sizeof state, "%s", av[i] + 6);
	}
	if (spank_get_item(sp, S_JOB_ID, &job) != ESPANK_SUCCESS ||
	    spank_get_item(sp, S_JOB_STEPID, &step) != ESPANK_SUCCESS)
		return -1;
	if (step == SLURM_EXTERN_CONT)
		return 0;
	if (!marked(state, job)) {
		if (!image[0] && !request[0] && !start[0])
			return 0; /* an ordinary job */
		slurm_error("wnodes: job %u asked for a VM, but this node prepared none: not run on the bare host "
			    "(the reason is in the job's AdminComment: scontrol show job %u)", job, job);
		return -1;
	}
#if SLURM_VERSION_NUMBER >= SLURM_VERSION_NUM(23, 11, 0)
	const char *before[] = { run, "--" };
	return spank_prepend_task_argv(sp, 2, before) == ESPANK_SUCCESS ? 0 : -1;
#else
	/* Before 23.11 argv cannot grow: the launcher takes the first word's place and gets it in
	 * WNODES_ARGV0. spank_get_item() hands out the array that slurmstepd will execute. */
	int argc;
	char **argv;
	if (spank_get_item(sp, S_JOB_ARGV, &argc, &argv) != ESPANK_SUCCESS || argc < 1 ||
	    spank_setenv(sp, "WNODES_ARGV0", argv[0], 1) != ESPANK_SUCCESS)
		return -1;
	argv[0] = run;
	return 0;
#endif
}
