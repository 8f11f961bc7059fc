//! Arguments, configuration, start, stop. The only part of the daemon that prints.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use coracle_cri::config::{self, Config, Loaded, Overrides};
use coracle_cri::daemon::Daemon;
use coracle_cri::error::{Error, Kind, Result};
use coracle_cri::spec_builder::seccomp;
use coracle_cri::streaming::{StreamingConfig, StreamingServer};
use coracle_cri::streaming_backend::DaemonBackend;
use coracle_cri::{grpc, listen};
use tokio::signal::unix::{SignalKind, signal};

/// A container runtime for Kubernetes: serves the CRI on a unix socket.
#[derive(Parser)]
#[command(name = "coracled", version)]
struct Args {
    /// Configuration file (TOML); without it the defaults hold.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Directory of images and records.
    #[arg(long, global = true)]
    root: Option<PathBuf>,
    /// Directory of bundles and sockets, gone after a reboot.
    #[arg(long, global = true)]
    state: Option<PathBuf>,
    /// Socket to serve on, as a path or as unix://path.
    #[arg(long, global = true)]
    socket: Option<String>,
    /// error, warn, info, debug or trace.
    #[arg(long, global = true)]
    log_level: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Print a configuration.
    Config {
        #[command(subcommand)]
        which: Which,
    },
}

#[derive(Subcommand)]
enum Which {
    /// The default one, with comments.
    Default,
    /// The one in force: defaults, file and flags merged.
    Dump,
    /// The seccomp profile of RuntimeDefault, as `linux.seccomp` of config.json: something to
    /// start a profile of one's own from.
    Seccomp {
        /// A capability that the container has, such as CAP_SYS_ADMIN; may be repeated.
        #[arg(long = "cap", value_name = "CAPABILITY")]
        capabilities: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coracled: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    match &args.command {
        Some(Command::Config {
            which: Which::Default,
        }) => {
            print!("{}", config::DEFAULT_TOML);
            return Ok(());
        }
        Some(Command::Config {
            which: Which::Seccomp { capabilities },
        }) => {
            println!("{:#}", seccomp::default_profile(capabilities));
            return Ok(());
        }
        _ => {}
    }
    let overrides = Overrides {
        root: args.root,
        state: args.state,
        socket: args
            .socket
            .map(|s| PathBuf::from(s.strip_prefix("unix://").unwrap_or(&s))),
        log_level: args.log_level,
    };
    let loaded = config::load(args.config.as_deref(), &overrides)?;
    if args.command.is_some() {
        for key in &loaded.unknown {
            eprintln!("coracled: warning: unknown key in the configuration: {key}");
        }
        print!("{}", config::dump(&loaded.config)?);
        return Ok(());
    }
    empty_signal_mask()?;
    start_log(&loaded.config)?;
    for key in &loaded.unknown {
        tracing::warn!(key, "unknown key in the configuration");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::io("start", "threads", e))?;
    let served = runtime.block_on(serve(loaded));
    // Work that still runs is in the records, and taken up at the next start.
    runtime.shutdown_background();
    served
}

fn start_log(config: &Config) -> Result<()> {
    let filter = std::env::var("CORACLED_LOG").unwrap_or_else(|_| filter(&config.log.level));
    let filter = tracing_subscriber::EnvFilter::try_new(&filter)
        .map_err(|e| Error::invalid("log.level", filter.clone()).because(e))?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false);
    if config.log.format == "json" {
        lines.json().init();
    } else {
        lines.init();
    }
    Ok(())
}

/// The level is for our own crates. What libraries have to say below a warning is for whoever
/// sets CORACLED_LOG.
fn filter(level: &str) -> String {
    let ours = ["coracled", "coracle_cri", "coracle_image_store"];
    let ours = ours.map(|name| format!("{name}={level}")).join(",");
    let others = if level == "error" { "error" } else { "warn" };
    format!("{others},{ours}")
}

/// An inherited signal mask would keep us from stopping, and go on to shims and containers.
fn empty_signal_mask() -> Result<()> {
    nix::sys::signal::SigSet::empty()
        .thread_set_mask()
        .map_err(|e| Error::io("pthread_sigmask", "SIG_SETMASK", e))
}

async fn serve(loaded: Loaded) -> Result<()> {
    let config = loaded.config;
    let socket = config.socket.clone();
    // The lock comes first: nothing may be touched that another daemon is using.
    let listening = listen::bind(&socket)?;
    let daemon = Daemon::open(config)?;
    let unfinished = daemon.load_records()?;
    let streaming = StreamingConfig::new(daemon.config.streaming.listen);
    let streaming = StreamingServer::start(streaming, DaemonBackend(daemon.clone()))
        .await
        .map_err(|e| Error::new(Kind::Internal, e.to_string(), ""))?;
    let _ = daemon.streaming.set(streaming);
    tokio::spawn(daemon.clone().recover(unfinished));
    tokio::spawn(daemon.clone().ask_features());
    tracing::info!(socket = %socket.display(), "serving");
    notify("READY=1");
    grpc::serve(daemon.clone(), listening, stopped()).await?;
    notify("STOPPING=1");
    // With pods the bridge has to stay; without any, nothing of ours is left on the host.
    if daemon.registry.sandboxes.all().is_empty()
        && let Err(error) = daemon.network.teardown().await
    {
        tracing::warn!(%error, "the pod bridge remains");
    }
    let _ = std::fs::remove_file(&socket);
    tracing::info!("stopped; containers keep running");
    drop::<Arc<Daemon>>(daemon);
    Ok(())
}

/// Returns at SIGTERM or SIGINT.
async fn stopped() {
    let listen = |kind| signal(kind).ok();
    let wait = |signal: Option<tokio::signal::unix::Signal>| async move {
        match signal {
            Some(mut signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(listen(SignalKind::terminate())) => {}
        () = wait(listen(SignalKind::interrupt())) => {}
    }
}

/// Tells systemd, if it asked to be told (sd_notify(3)).
fn notify(message: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let bytes = path.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let Ok(socket) = UnixDatagram::unbound() else {
        return;
    };
    if let Ok(address) = address {
        let _ = socket.send_to_addr(message.as_bytes(), &address);
    }
}
