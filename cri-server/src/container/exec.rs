//! Owns processes that join a running container: ExecSync with bounded output and a timeout that
//! ends the whole process tree, and Exec for the streaming server.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use super::Container;
use super::create::require;
use super::state::Request;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::process_tree;
use crate::shim_client::{NewExec, ShimClient, TaskExit};
use crate::spec_builder::document::Spec;
use crate::streaming::{ExecSession, SessionIo, TerminalSize};

/// What is kept of each stream; more is read and dropped, so that the process does not block.
const MAX_OUTPUT: usize = 16 << 20;

/// How an ExecSync ended.
#[derive(Debug)]
pub struct Outcome {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code.
    pub exit_code: i32,
}

/// An exec that runs.
struct Running {
    shim: ShimClient,
    id: String,
    exec_id: String,
    pid: u32,
}

impl Daemon {
    /// The shim of a container's sandbox; it must run.
    pub async fn shim_of(&self, container: &Container) -> Result<ShimClient> {
        let sandbox_id = container.fixed.sandbox_id.as_str();
        let sandbox = self.registry.sandboxes.find(sandbox_id)?;
        self.running_shim(&sandbox).await.ok_or_else(|| {
            let what = format!("shim of sandbox {sandbox_id}");
            Error::new(Kind::Unavailable, what, "cannot be reached")
        })
    }

    /// Runs a command to its end. `timeout` zero waits for ever.
    pub async fn exec_sync(
        self: &Arc<Self>,
        container: &Arc<Container>,
        cmd: Vec<String>,
        timeout: Duration,
    ) -> Result<Outcome> {
        if cmd.is_empty() {
            return Err(Error::invalid("cmd", "is empty"));
        }
        require(container, Request::Reach)?;
        let (stdout, stdout_write) = open_pipe()?;
        let (stderr, stderr_write) = open_pipe()?;
        let io = SessionIo {
            stdin: None,
            stdout: Some(stdout_write),
            stderr: Some(stderr_write),
        };
        let running = self.start_exec(container, cmd, false, io).await?;
        let (ended, exited) = watch::channel(false);
        let outputs = async {
            tokio::join!(
                read_output(stdout, exited.clone()),
                read_output(stderr, exited)
            )
        };
        let wait = async {
            let exit = running.wait().await;
            ended.send_replace(true);
            exit
        };
        let limit = if timeout.is_zero() {
            Duration::MAX
        } else {
            timeout
        };
        let answer = tokio::time::timeout(limit, async { tokio::join!(wait, outputs) }).await;
        let Ok((exit, (stdout, stderr))) = answer else {
            self.end_exec(container, &running).await;
            let what = format!("exec in container {}", container.id());
            let text = format!("timed out after {} s", timeout.as_secs());
            return Err(Error::new(Kind::DeadlineExceeded, what, text));
        };
        let exit = exit?;
        running.delete();
        Ok(Outcome {
            stdout,
            stderr,
            exit_code: i32::try_from(exit.status).unwrap_or(255),
        })
    }

    /// Runs a command on the pipes of a streaming session; answers with its exit code.
    pub async fn exec_session(
        self: &Arc<Self>,
        session: ExecSession,
        io: SessionIo,
        mut resize: mpsc::Receiver<TerminalSize>,
    ) -> Result<i32> {
        let container = self.registry.containers.find(&session.container_id)?;
        require(&container, Request::Reach)?;
        let running = self
            .start_exec(&container, session.cmd, session.tty, io)
            .await?;
        let exit = running.wait_resizing(&mut resize).await?;
        running.delete();
        Ok(i32::try_from(exit.status).unwrap_or(255))
    }

    async fn start_exec(
        &self,
        container: &Container,
        cmd: Vec<String>,
        tty: bool,
        io: SessionIo,
    ) -> Result<Running> {
        let shim = self.shim_of(container).await?;
        let failed = |e: Error| e.within("exec in container", container.id());
        let process = process(container, cmd, tty).map_err(failed)?;
        let mut bytes = [0_u8; 16];
        crate::id::fill_random(&mut bytes)?;
        let exec_id: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let new = NewExec {
            id: container.id().to_owned(),
            exec_id: exec_id.clone(),
            process,
            terminal: tty,
            stdin: io.stdin,
            stdout: io.stdout,
            // A terminal has one stream.
            stderr: if tty { None } else { io.stderr },
        };
        shim.exec(new).await.map_err(|e| failed(e.into()))?;
        match shim.start(container.id(), &exec_id).await {
            Ok(pid) => Ok(Running {
                shim,
                id: container.id().to_owned(),
                exec_id,
                pid,
            }),
            Err(error) => {
                let _ = shim.delete(container.id(), &exec_id).await;
                Err(failed(error.into()))
            }
        }
    }

    /// Kills an exec and everything that it started, then forgets it.
    async fn end_exec(&self, container: &Container, running: &Running) {
        let cgroups = self.host.cgroups.clone();
        let (path, pid) = (container.fixed.cgroups_path.clone(), running.pid);
        let killed = tokio::task::spawn_blocking(move || {
            process_tree::kill(pid, || cgroups.processes(&path));
        });
        let _ = killed.await;
        let _ = running
            .shim
            .kill(&running.id, &running.exec_id, 9, false)
            .await;
        let wait = running.shim.wait(&running.id, &running.exec_id);
        let _ = tokio::time::timeout(Duration::from_secs(2), wait).await;
        let _ = running.shim.delete(&running.id, &running.exec_id).await;
    }
}

impl Running {
    async fn wait(&self) -> Result<TaskExit> {
        Ok(self.shim.wait(&self.id, &self.exec_id).await?)
    }

    async fn wait_resizing(&self, resize: &mut mpsc::Receiver<TerminalSize>) -> Result<TaskExit> {
        let wait = self.wait();
        tokio::pin!(wait);
        loop {
            tokio::select! {
                exit = &mut wait => return exit,
                Some(size) = resize.recv() => {
                    let (width, height) = (u32::from(size.width), u32::from(size.height));
                    // A terminal that is going has no size any more.
                    let _ = self.shim.resize(&self.id, &self.exec_id, width, height).await;
                }
            }
        }
    }

    /// Forgets an exec that has ended; the caller need not wait for that.
    fn delete(self) {
        tokio::spawn(async move {
            let Running {
                shim, id, exec_id, ..
            } = self;
            if let Err(error) = shim.delete(&id, &exec_id).await {
                tracing::debug!(container = id, exec = exec_id, %error, "exec not deleted");
            }
        });
    }
}

/// The container's own process with another command.
fn process(container: &Container, cmd: Vec<String>, tty: bool) -> Result<Vec<u8>> {
    let path = container.fixed.bundle.join("config.json");
    let failed = |e: io::Error| Error::io("read", path.display(), e);
    let bytes = std::fs::read(&path).map_err(failed)?;
    let spec: Spec = serde_json::from_slice(&bytes).map_err(|e| failed(e.into()))?;
    let mut process = spec.process;
    process.args = cmd;
    process.terminal = tty;
    if tty && !process.env.iter().any(|pair| pair.starts_with("TERM=")) {
        process.env.push("TERM=xterm".to_owned());
    }
    serde_json::to_vec(&process).map_err(|e| failed(e.into()))
}

fn open_pipe() -> Result<(pipe::Receiver, OwnedFd)> {
    let failed = |e: io::Error| Error::io("pipe2", "O_CLOEXEC", e);
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    Ok((pipe::Receiver::from_owned_fd(read).map_err(failed)?, write))
}

/// Reads to the end of the stream, or, once the process has ended, to the end of what it left in
/// the pipe: a child that keeps the pipe open does not hold the answer.
async fn read_output(mut pipe: pipe::Receiver, mut exited: watch::Receiver<bool>) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = vec![0_u8; 64 << 10];
    loop {
        let read = tokio::select! {
            biased;
            read = pipe.read(&mut buffer) => read,
            _ = exited.wait_for(|exited| *exited) => break,
        };
        match read {
            Ok(0) | Err(_) => return kept,
            Ok(n) => keep(&mut kept, &buffer[..n]),
        }
    }
    // What one pipe can hold, and no endless stream of somebody who goes on writing.
    let mut left = 1 << 20;
    while left > 0 {
        match pipe.try_read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                keep(&mut kept, &buffer[..n]);
                left -= n.min(left);
            }
        }
    }
    kept
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8]) {
    let room = MAX_OUTPUT.saturating_sub(kept.len());
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[tokio::test]
    async fn output_of_an_ended_process_is_not_held_by_its_child() {
        let (read, write) = open_pipe().unwrap();
        let mut held = std::fs::File::from(write);
        held.write_all(b"said").unwrap();
        let (ended, exited) = watch::channel(false);
        let reading = tokio::spawn(read_output(read, exited));
        tokio::time::sleep(Duration::from_millis(20)).await;
        ended.send_replace(true);
        let output = tokio::time::timeout(Duration::from_secs(1), reading).await;
        assert_eq!(output.unwrap().unwrap(), b"said");
        drop(held);
    }

    #[tokio::test]
    async fn output_over_the_bound_is_dropped_but_read() {
        let (read, write) = open_pipe().unwrap();
        let (_ended, exited) = watch::channel(false);
        let writer = std::thread::spawn(move || {
            let mut file = std::fs::File::from(write);
            let chunk = vec![b'x'; 1 << 20];
            for _ in 0..17 {
                file.write_all(&chunk).unwrap();
            }
        });
        let output = read_output(read, exited).await;
        writer.join().unwrap();
        assert_eq!(output.len(), MAX_OUTPUT);
    }
}
