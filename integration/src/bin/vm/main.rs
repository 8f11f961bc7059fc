//! The guest for tests, from a shell:
//!
//! ```text
//! vm up NAME [--with PACKAGE]... [--share HOST:GUEST]... [--memory MIB] [--cpus N]
//! vm exec NAME [--env K=V]... [--cwd DIR] [--timeout SECONDS] -- COMMAND...
//! vm down NAME
//! vm image [--with PACKAGE]...
//! vm test --tests MESSAGES_OF_CARGO [--filter NAME]... [--minutes N]
//! ```
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use coracle_integration::vm::guest::{self, Machine, Share};
use coracle_integration::vm::image::Image;
use coracle_integration::vm::lane::Lane;
use coracle_integration::vm::wire::{Ended, Kind, Request};
use coracle_integration::vm::{agent, client};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vm: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(args: &[String]) -> Result<ExitCode> {
    let (verb, rest) = args
        .split_first()
        .context("up, exec, down, image or test")?;
    match verb.as_str() {
        "up" => up(rest)?,
        "exec" => return exec(rest),
        "down" => guest::stop(&directory(rest.first().context("a name is missing")?))?,
        "test" => return test(rest),
        "image" => println!("{}", Image::get(&Asked::parse(rest)?.with)?.disk.display()),
        // The guest's side.
        "agent" => agent::serve()?,
        "into" => {
            let (cgroup, argv) = rest.split_first().context("a cgroup is missing")?;
            agent::enter_and_exec(Path::new(cgroup), argv)?;
        }
        _ => bail!("{verb}: there are up, exec, down, image and test"),
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Default)]
struct Asked {
    name: Option<String>,
    with: Vec<String>,
    machine: Machine,
    request: Request,
    tests: Option<PathBuf>,
    filters: Vec<String>,
    minutes: Option<u64>,
}

impl Asked {
    fn parse(args: &[String]) -> Result<Self> {
        let mut asked = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            if arg == "--" {
                asked.request.argv = args.map(Clone::clone).collect();
                break;
            }
            if !arg.starts_with("--") {
                asked.name = Some(arg.clone());
                continue;
            }
            let value = args
                .next()
                .with_context(|| format!("{arg}: a value is missing"))?;
            asked.set(arg, value).with_context(|| arg.clone())?;
        }
        Ok(asked)
    }

    fn set(&mut self, flag: &str, value: &str) -> Result<()> {
        match flag {
            "--with" => self.with.extend(value.split(',').map(str::to_owned)),
            "--memory" => self.machine.memory_mib = value.parse()?,
            "--cpus" => self.machine.cpus = value.parse()?,
            "--share" => {
                let (host, guest) = value.split_once(':').context("HOST:GUEST")?;
                self.machine.shares.push(Share {
                    host: PathBuf::from(host).canonicalize()?,
                    guest: guest.to_owned(),
                    writable: true,
                });
            }
            "--env" => {
                let (key, value) = value.split_once('=').context("KEY=VALUE")?;
                self.request.env.push((key.to_owned(), value.to_owned()));
            }
            "--tests" => self.tests = Some(value.into()),
            "--filter" => self.filters.push(value.to_owned()),
            "--minutes" => self.minutes = Some(value.parse()?),
            "--cwd" => self.request.cwd = Some(value.to_owned()),
            "--timeout" => self.request.seconds = Some(value.parse()?),
            _ => bail!("no such flag"),
        }
        Ok(())
    }
}

fn directory(name: &str) -> PathBuf {
    std::env::temp_dir().join("coracle-vm").join(name)
}

fn up(args: &[String]) -> Result<()> {
    let asked = Asked::parse(args)?;
    let dir = directory(&asked.name.context("a name is missing")?);
    let image = Image::get(&asked.with)?;
    guest::start_detached(&image, &asked.machine, &dir)?;
    let request = Request {
        argv: vec!["true".into()],
        ..Request::default()
    };
    let ended = client::exec(&dir, request, Duration::from_secs(900), &mut |_, _| Ok(()))
        .with_context(|| format!("see {}/console", dir.display()))?;
    if ended != Ended::Code(0) {
        bail!("the guest cannot run a command: {ended:?}");
    }
    Ok(())
}

fn test(args: &[String]) -> Result<ExitCode> {
    let asked = Asked::parse(args)?;
    let lane = Lane {
        tests: asked.tests.context("--tests is missing")?,
        filters: asked.filters,
        limit: Duration::from_secs(60 * asked.minutes.unwrap_or(25)),
    };
    Ok(if lane.run()? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn exec(args: &[String]) -> Result<ExitCode> {
    let asked = Asked::parse(args)?;
    let dir = directory(&asked.name.context("a name is missing")?);
    // The guest enforces the time; this is for a guest that no longer answers.
    let limit = asked.request.seconds.map_or(24 * 3600, |s| s + 60);
    let mut sink = |kind: Kind, bytes: &[u8]| -> Result<()> {
        if kind == Kind::Stderr {
            std::io::stderr().write_all(bytes)?;
        } else {
            let mut out = std::io::stdout();
            out.write_all(bytes)?;
            out.flush()?;
        }
        Ok(())
    };
    match client::exec(&dir, asked.request, Duration::from_secs(limit), &mut sink)? {
        Ended::Code(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(255))),
        Ended::Signal(signal) => Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(255))),
        Ended::TimedOut => {
            eprintln!("vm: timed out");
            Ok(ExitCode::from(124))
        }
        Ended::NotStarted(why) => bail!("{why}"),
    }
}
