//! `create`: a container up to its last step, which `start` lets it take.

use std::path::PathBuf;
use std::process::ExitCode;

use coracle_oci::ContainerId;

use super::GlobalArgs;
use crate::bundle::Bundle;
use crate::error::{Error, Kind, Result};
use crate::launch::{self, Request, notify};
use crate::log;
use crate::plan::LaunchOptions;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub container: ContainerArgs,
}

/// What `create` and `run` have in common.
#[derive(Debug, clap::Args)]
pub struct ContainerArgs {
    /// path to the root of the bundle directory, defaults to the current directory
    #[arg(long, short = 'b', value_name = "value")]
    pub bundle: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive the master end of the console's pseudoterminal
    #[arg(long, value_name = "value")]
    pub console_socket: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive a file descriptor of the init process
    #[arg(long, value_name = "value")]
    pub pidfd_socket: Option<PathBuf>,
    /// specify the file to write the process id to
    #[arg(long, value_name = "value")]
    pub pid_file: Option<PathBuf>,
    /// do not use pivot root to jail process inside rootfs; for hosts whose root is a ramdisk
    #[arg(long)]
    pub no_pivot: bool,
    /// do not create a new session keyring for the container
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// the name of the container
    #[arg(value_name = "container-id")]
    pub id: String,
}

impl ContainerArgs {
    /// Before anything else is opened: what the caller must have left open, and the runtime's own
    /// binary.
    ///
    /// # Errors
    /// A promised fd is not there.
    pub fn prepare(&self) -> Result<LaunchOptions> {
        let listen_fds = check_inherited_fds(self.preserve_fds)?;
        crate::sealed::ensure()?;
        Ok(LaunchOptions {
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            preserve_fds: self.preserve_fds,
            listen_fds,
            gated: false,
            bridged: false,
        })
    }

    /// The request that both commands make.
    ///
    /// # Errors
    /// The id or the bundle is no such thing.
    pub fn request<'a>(
        &'a self,
        global: &'a GlobalArgs,
        options: LaunchOptions,
    ) -> Result<Request<'a>> {
        let path =
            |path: &'a Option<PathBuf>| path.as_deref().filter(|path| !path.as_os_str().is_empty());
        // By then this process is one that runs from it.
        log::debug_each(global, || {
            let argv: Vec<_> = std::env::args_os().take(1).collect();
            let program = super::program(&argv);
            ["/proc/self/exe clone", crate::sealed::way()]
                .map(|what| format!("{program} exeseal: using {what}"))
        });
        let id = ContainerId::parse(&self.id).map_err(|error| Error::invalid(error.to_string()))?;
        let mut bundle = Bundle::open(path(&self.bundle))?;
        if notify::host().is_some() {
            bundle.config = notify::add_to(&bundle.config, &global.root, id.as_str())?;
        }
        Ok(Request {
            id,
            bundle,
            global,
            options,
            console_socket: path(&self.console_socket),
            pidfd_socket: path(&self.pidfd_socket),
            pid_file: path(&self.pid_file),
            foreground: false,
        })
    }
}

/// An fd that the caller promised and did not open would be one of ours by the time of the clone,
/// and the container would inherit it. Gives the number of activation sockets.
///
/// # Errors
/// A promised fd is not there.
pub fn check_inherited_fds(preserve: u32) -> Result<u32> {
    let listen_fds = listen_fds();
    for fd in 3..3_i64 + i64::from(preserve) + i64::from(listen_fds) {
        let open =
            i32::try_from(fd).is_ok_and(|fd| coracle_sys::process::duplicate_inherited(fd).is_ok());
        if !open {
            let what = match fd - 3 - i64::from(listen_fds) {
                at @ 0.. => format!("preserved-fd {at} (of {preserve})"),
                _ => format!("fd {fd} (of LISTEN_FDS={listen_fds})"),
            };
            return Err(Error::new(
                Kind::Invalid,
                format!("unable to stat {what}: stat /proc/self/fd/{fd}"),
                "",
            )
            .source(rustix::io::Errno::NOENT));
        }
    }
    Ok(listen_fds)
}

/// Socket activation: how many sockets this very process was given (sd_listen_fds(3)).
fn listen_fds() -> u32 {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u32>().ok())
    };
    match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(fds)) if pid == std::process::id() => fds,
        _ => 0,
    }
}

pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let mut options = args.container.prepare()?;
    options.gated = true;
    let launched = launch::launch(args.container.request(global, options)?)?;
    match launched.release(global) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(launched.give_up(error)),
    }
}
