//! `checkpoint`: saves a container's processes as CRIU images.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use coracle_oci::state::{State, Status};
use rustix::fs::OFlags;

use super::GlobalArgs;
use crate::criu::checkpoint::{Extra, checkpoint};
use crate::criu::{ManageCgroups, Options};
use crate::error::{Error, Result};
use crate::launch::undo;
use crate::log;
use crate::state::{Container, Request, open_process, wait_exit};

/// How long processes that CRIU has killed may take to die.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    criu: CriuArgs,
    /// path for previous criu image files in pre-dump
    #[arg(long, value_name = "value")]
    parent_path: Option<String>,
    /// leave the process running after checkpointing
    #[arg(long)]
    leave_running: bool,
    /// skip in-flight tcp connections
    #[arg(long)]
    tcp_skip_in_flight: bool,
    /// allow one to link unlinked files back when possible
    #[arg(long)]
    link_remap: bool,
    /// criu writes \0 to this FD once lazy-pages is ready
    #[arg(long, value_name = "fd", default_value_t = -1, hide_default_value = true,
          allow_negative_numbers = true)]
    status_fd: i32,
    /// ADDRESS:PORT of the page server
    #[arg(
        long,
        value_name = "value",
        default_value = "",
        hide_default_value = true
    )]
    page_server: String,
    /// dump container's memory information only, leave the container running after this
    #[arg(long)]
    pre_dump: bool,
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
}

/// What checkpoint and restore have in common.
#[derive(Debug, clap::Args)]
pub struct CriuArgs {
    /// path to criu image files (default: "checkpoint" in the current directory)
    #[arg(long, value_name = "value")]
    image_path: Option<PathBuf>,
    /// path for saving work files and logs
    #[arg(long, value_name = "value")]
    work_path: Option<PathBuf>,
    /// allow open tcp connections
    #[arg(long)]
    tcp_established: bool,
    /// allow external unix sockets
    #[arg(long)]
    ext_unix_sk: bool,
    /// allow shell jobs
    #[arg(long)]
    shell_job: bool,
    /// use userfaultfd to lazily restore memory pages
    #[arg(long)]
    lazy_pages: bool,
    /// handle file locks, for safety
    #[arg(long)]
    file_locks: bool,
    /// cgroups mode: soft|full|strict|ignore (default: soft)
    #[arg(
        long,
        value_name = "value",
        default_value = "",
        hide_default_value = true
    )]
    manage_cgroups_mode: String,
    /// create a namespace, but don't restore its properties
    #[arg(long, value_name = "value")]
    empty_ns: Vec<String>,
    /// enable auto deduplication of memory images
    #[arg(long)]
    auto_dedup: bool,
}

impl CriuArgs {
    /// # Errors
    /// A value is none of the option's.
    pub fn options(&self) -> Result<Options> {
        // The one namespace that runc knows here, which it never restores the properties of.
        if let Some(name) = self.empty_ns.iter().find(|name| *name != "network") {
            return Err(Error::invalid(format!(
                "namespace {name:?} is not supported"
            )));
        }
        let given =
            |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let images = match given(&self.image_path) {
            Some(path) => path,
            None => std::env::current_dir()
                .map_err(|error| Error::system("getcwd", "", error))?
                .join("checkpoint"),
        };
        Ok(Options {
            images,
            work: given(&self.work_path),
            tcp_established: self.tcp_established,
            ext_unix_sk: self.ext_unix_sk,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            auto_dedup: self.auto_dedup,
            lazy_pages: self.lazy_pages,
            cgroups: ManageCgroups::parse(&self.manage_cgroups_mode)?,
        })
    }
}

/// As runc says it; it may work, with an unprivileged CRIU.
pub fn warn_if_rootless(global: &GlobalArgs) {
    if !rustix::process::geteuid().is_root() {
        log::warning(
            global,
            "coracle checkpoint is untested with rootless containers",
        );
    }
}

/// # Errors
/// The container is not running, or CRIU fails; it goes on running then.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    warn_if_rootless(global);
    let container = Container::open(&global.root, &args.id)?;
    let _lock = container.entry.lock()?;
    container.allows(Request::Checkpoint)?;
    let options = args.criu.options()?;
    make_images(&options.images)?;
    let extra = Extra {
        parent: parent(&options.images, args.parent_path.as_deref())?,
        leave_running: args.leave_running,
        pre_dump: args.pre_dump,
        tcp_skip_in_flight: args.tcp_skip_in_flight,
        link_remap: args.link_remap,
        page_server: page_server(&args.page_server)?,
        status: match options.lazy_pages && args.status_fd >= 0 {
            true => Some(status_file(args.status_fd)?),
            false => None,
        },
    };
    let plan = checkpoint(&container, &options, extra, global)?;
    if args.leave_running || args.pre_dump {
        return Ok(ExitCode::SUCCESS);
    }
    // The images are good, whatever becomes of the rest.
    if let Err(error) = forget(&container, &plan) {
        log::warning(global, &format!("{error:#}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// CRIU has killed the processes: what is left of the container goes.
fn forget(container: &Container, plan: &crate::plan::Plan) -> Result<()> {
    if let Some(process) = open_process(container.record.init())? {
        wait_exit(&process, TIMEOUT)?;
    }
    undo::destroy(
        &container.record,
        &container.cgroup(),
        &container.entry,
        &plan.hooks,
        &State::new(&container.record, Status::Stopped),
    )
}

fn make_images(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::system("mkdir", path.display().to_string(), error))
}

/// The images of the dump before this one, relative to this one's.
fn parent(images: &Path, path: Option<&str>) -> Result<Option<String>> {
    let Some(path) = path.filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    if Path::new(path).is_absolute() {
        return Err(Error::invalid("--parent-path must be relative"));
    }
    let place = images.join(path);
    let invalid = |error: std::io::Error| {
        Error::system("stat", place.display().to_string(), error).context("invalid --parent-path")
    };
    let metadata = std::fs::metadata(&place).map_err(invalid)?;
    if !metadata.is_dir() {
        return Err(invalid(std::io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    Ok(Some(path.to_owned()))
}

/// `ADDRESS:PORT`, an IPv6 address in brackets.
fn page_server(text: &str) -> Result<Option<(String, i32)>> {
    if text.is_empty() {
        return Ok(None);
    }
    let split = match text.strip_prefix('[') {
        Some(rest) => rest.split_once("]:"),
        None => text
            .rsplit_once(':')
            .filter(|(address, _)| !address.contains(':')),
    };
    let (address, port) = split
        .filter(|(address, port)| !address.is_empty() && !port.is_empty())
        .ok_or_else(|| Error::invalid("use --page-server ADDRESS:PORT to specify page server"))?;
    let port = port
        .parse::<u16>()
        .map_err(|_| Error::invalid("invalid port number"))?;
    Ok(Some((address.to_owned(), i32::from(port))))
}

/// Takes over the file that the caller has left open, so that its reader sees the end of it as
/// soon as we are done with it.
fn status_file(number: i32) -> Result<OwnedFd> {
    let invalid =
        |why: String| Error::invalid(format!("invalid --status-fd argument {number}: {why}"));
    let file = coracle_sys::process::duplicate_inherited(number)
        .map_err(|error| invalid(crate::error::errno_text(error.raw_os_error().unwrap_or(0))))?;
    let flags = rustix::fs::fcntl_getfl(&file)
        .map_err(|error| Error::system("fcntl(F_GETFL)", number.to_string(), error))?;
    if flags & OFlags::ACCMODE == OFlags::RDONLY {
        return Err(invalid("not writable".to_owned()));
    }
    if number > 2 {
        // The copy is what counts from here on.
        let _ = nix::unistd::close(number);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_server_table() {
        let server = |text| page_server(text).map_err(|error| error.to_string());
        assert_eq!(server(""), Ok(None));
        assert_eq!(server("1.2.3.4:27"), Ok(Some(("1.2.3.4".to_owned(), 27))));
        assert_eq!(server("[::1]:27"), Ok(Some(("::1".to_owned(), 27))));
        for wrong in ["27", ":27", "host:", "::1:27", "[::1]27"] {
            let error = server(wrong).unwrap_err();
            assert!(error.contains("ADDRESS:PORT"), "{wrong}: {error}");
        }
        for wrong in ["host:x", "host:-1", "host:70000"] {
            assert_eq!(server(wrong).unwrap_err(), "invalid port number", "{wrong}");
        }
    }

    #[test]
    fn parent_is_a_directory_beside_the_images() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["images", "before"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("file"), "").unwrap();
        let images = dir.path().join("images");
        let parent = |path| parent(&images, path).map_err(|error| format!("{error:#}"));
        assert_eq!(parent(None), Ok(None));
        assert_eq!(parent(Some("../before")), Ok(Some("../before".to_owned())));
        assert!(
            parent(Some("/before"))
                .unwrap_err()
                .contains("must be relative")
        );
        for wrong in ["../gone", "../file"] {
            assert!(
                parent(Some(wrong))
                    .unwrap_err()
                    .starts_with("invalid --parent-path: stat")
            );
        }
    }
}
