//! `probe`: the one static program inside the test images. Without arguments it prints as JSON
//! what a container sees of itself; with one of the commands below it does one thing that a test
//! wants done. It never changes anything that a command does not name.
#![forbid(unsafe_code)]

mod attempt;
mod load;
mod net;
mod show;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "probe [command]
  show [PATH...]              what this process sees, and each PATH, as JSON (the default)
  true                        exit 0
  exit CODE                   exit CODE
  sleep SECONDS               sleep, then exit 0
  euid                        print `Effective uid: N` (also when called as nnp)
  write FILE TEXT             write TEXT and a newline to FILE
  drain FILE TEXT             read stdin to its end, then write as `write` does
  sink                        read stdin to its end, print the byte count and the sha256
  source BYTES                write BYTES pseudo-random bytes to stdout
  lines COUNT MICROSECONDS    print numbered lines, COUNT 0 for ever
  flood COUNT LENGTH          print COUNT numbered lines of LENGTH bytes as fast as possible
  eat MIB [SECONDS]           touch MIB of memory, then hold them
  burn THREADS SECONDS        use the CPU
  trap CODE                   print the first signal's name, then exit CODE
  tty                         print the terminal's size, or `not a tty`
  unshare user|net|mount|pid  try it, print `ok` or the error
  bind FROM TO                bind mount FROM on TO, then hold it
  lock FILE                   make FILE, lock it as flock(2) does, then hold it
  exec PROGRAM [ARG...]       become PROGRAM
  serve PORT [TEXT]           HTTP/1.1: GET answers TEXT, GET /show the JSON
  fetch HOST PORT PATH        HTTP GET, body to stdout
  echo PORT                   TCP: send back what comes in";

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args_os()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    if args.is_empty() {
        args.push("probe".to_owned());
    }
    let called_as = args[0].rsplit('/').next().unwrap_or_default().to_owned();
    let rest: Vec<&str> = args[1..].iter().map(String::as_str).collect();
    let result = match called_as.as_str() {
        "nnp" => run(&["euid"]),
        _ => run(&rest),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("probe: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(args: &[&str]) -> anyhow::Result<u8> {
    match args {
        [] => return run(&["show"]),
        ["show", paths @ ..] => {
            let text = serde_json::to_string_pretty(&show::everything(paths))?;
            print(&format!("{text}\n"))?;
        }
        ["true"] => {}
        ["exit", code] => return Ok(code.parse()?),
        ["sleep", seconds] => std::thread::sleep(Duration::from_secs_f64(seconds.parse()?)),
        ["euid"] => print(&format!(
            "Effective uid: {}\n",
            rustix::process::geteuid().as_raw()
        ))?,
        ["drain", file, text] => {
            std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())?;
            std::fs::write(file, format!("{text}\n"))?;
        }
        ["write", file, text] => std::fs::write(file, format!("{text}\n"))?,
        ["sink"] => load::sink()?,
        ["source", bytes] => load::source(bytes.parse()?)?,
        ["lines", count, pause] => load::lines(count.parse()?, pause.parse()?)?,
        ["flood", count, length] => load::flood(count.parse()?, length.parse()?)?,
        ["eat", mib] => load::eat(mib.parse()?, 3600.0)?,
        ["eat", mib, seconds] => load::eat(mib.parse()?, seconds.parse()?)?,
        ["burn", threads, seconds] => load::burn(threads.parse()?, seconds.parse()?),
        ["trap", code] => return load::trap(code.parse()?),
        ["tty"] => print(&show::terminal())?,
        ["unshare", kind] => return show::unshare(kind),
        ["bind", from, to] => {
            let none: Option<&str> = None;
            nix::mount::mount(Some(*from), *to, none, nix::mount::MsFlags::MS_BIND, none)?;
            print("bound\n")?;
            std::thread::sleep(Duration::from_secs(3600));
        }
        ["lock", file] => {
            let file = std::fs::File::create(file)?;
            file.lock()?;
            print("locked\n")?;
            std::thread::sleep(Duration::from_secs(3600));
            drop(file);
        }
        ["exec", program, rest @ ..] => {
            use std::os::unix::process::CommandExt as _;
            return Err(std::process::Command::new(program).args(rest).exec().into());
        }
        ["serve", port] => net::serve(port.parse()?, None)?,
        ["serve", port, text] => net::serve(port.parse()?, Some(text))?,
        ["fetch", host, port, path] => return net::fetch(host, port.parse()?, path),
        ["echo", port] => net::echo(port.parse()?)?,
        _ => {
            eprintln!("usage: {USAGE}");
            return Ok(2);
        }
    }
    Ok(0)
}

/// Writes all of it or fails: `println!` would panic on a closed pipe.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
