//! The long descriptions of the program and its commands, for help and manual pages.

pub(super) const PROGRAM: &str = "\
coracle runs containers from bundles: a bundle is a directory with a config.json
as the OCI runtime specification defines it, and the root filesystem that the
file names. Engines call it as they call runc: it takes the same commands and
flags and gives the same answers.

To run the container of the bundle in the working directory:

    # coracle run <container-id>

The id is a name of your choice that no other container under the same --root
has.";

pub(super) const CHECKPOINT: &str = "\
Writes the state of a running container to a directory of images with CRIU, and
ends the container unless told to leave it running.";

pub(super) const CREATE: &str = "\
Makes the container that the bundle describes, up to the point where its program
would begin: namespaces, cgroup, mounts and limits are there, and the init
process waits for \"coracle start\".";

pub(super) const DELETE: &str = "\
Gives back all that a stopped container holds: its cgroup, its mounts and its
directory under --root. With --force a running container is killed first, and
one that does not exist is no error.";

pub(super) const EVENTS: &str = "\
Prints one JSON document per line: the usage of the container's resources at
every interval, and its out-of-memory events as they happen.";

pub(super) const EXEC: &str = "\
Runs a command in a running container, with the environment, user, capabilities
and limits of the container's own process unless flags say otherwise; or the
process that a JSON file describes (--process). The exit code is the command's;
255 says that it could not be started.";

pub(super) const FEATURES: &str = "\
Prints what this runtime supports as the features document of the OCI runtime
specification.";

pub(super) const KILL: &str = "\
Sends a signal, by name or number, to the init process of the container. Without
a signal it is SIGTERM. SIGKILL for a container without a pid namespace of its
own goes to every process of its cgroup.";

pub(super) const LIST: &str = "\
Lists the containers under --root with their process, status, bundle, time of
creation and owner.";

pub(super) const PAUSE: &str = "\
Freezes all processes of the container, until \"coracle resume\".";

pub(super) const PS: &str = "\
Shows the processes of the container as ps(1) on the host sees them. What
follows the id goes to ps(1), instead of -ef; its output must have a PID column.";

pub(super) const RESTORE: &str = "\
Makes a container from the images that \"coracle checkpoint\" wrote, with CRIU;
its processes go on where they were.";

pub(super) const RESUME: &str = "\
Lets the processes of a paused container go on.";

pub(super) const RUN: &str = "\
Makes the container that the bundle describes and starts its program. Unless
detached, coracle stays: it connects the terminal, passes signals on, exits with
the program's exit code (128 and the signal's number if one ended it) and
deletes the container.";

pub(super) const SPEC: &str = "\
Writes a config.json to begin with. It runs \"sh\" in the directory \"rootfs\" in
namespaces of its own; edit process.args and the rest as needed. With --rootless
it maps the calling user to root in a user namespace and needs no privileges.";

pub(super) const START: &str = "\
Lets the program of a created container begin.";

pub(super) const STATE: &str = "\
Prints the state of a container as JSON: its id, process, status, bundle, root
filesystem, time of creation, annotations and owner.";

pub(super) const UPDATE: &str = "\
Changes the limits of a container that exists. Either all take effect or none.
The file of --resources holds a JSON document in the form of linux.resources of
config.json; what it leaves out stays.";
