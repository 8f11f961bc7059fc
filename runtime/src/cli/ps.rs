//! `ps`: the processes of a container, as pids or as the lines of ps(1).

use std::process::{Command, ExitCode};

use super::GlobalArgs;
use super::state::write_stdout;
use crate::error::{Error, Kind, Result};
use crate::state::Container;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// select one of: table or json
    #[arg(short, long, value_name = "value", default_value = "table")]
    format: String,
    /// the name of the container
    #[arg(value_name = "container-id")]
    id: String,
    /// options for ps(1), instead of -ef
    #[arg(
        value_name = "ps options",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    ps: Vec<String>,
}

/// # Errors
/// There is no such container, its cgroup cannot be read, or ps(1) fails.
pub fn run(args: &Args, global: &GlobalArgs) -> Result<ExitCode> {
    let container = Container::open(&global.root, &args.id)?;
    let pids = container.cgroup().pids()?;
    match args.format.as_str() {
        "table" => write_stdout(&table(&pids, &args.ps)?)?,
        "json" => {
            let pids = if pids.is_empty() {
                "null".to_owned()
            } else {
                format!("{pids:?}")
            };
            write_stdout(&format!("{}\n", pids.replace(' ', "")))?;
        }
        _ => return Err(Error::invalid("invalid format option")),
    }
    Ok(ExitCode::SUCCESS)
}

fn table(pids: &[i32], options: &[String]) -> Result<String> {
    let mut command = Command::new("ps");
    if options.is_empty() {
        command.arg("-ef");
    } else {
        command.args(options);
    }
    let output = command
        .output()
        .map_err(|error| Error::system("exec", "ps", error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let message = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
        let status = match output.status.code() {
            Some(code) => format!("exit status {code}"),
            None => output.status.to_string(),
        };
        return Err(Error::system(status, "", message.trim().to_owned()));
    }
    select(&text, pids)
}

/// The head line, and those lines whose PID column is in the list.
fn select(text: &str, pids: &[i32]) -> Result<String> {
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let Some(column) = head.split_whitespace().position(|name| name == "PID") else {
        return Err(Error::new(
            Kind::Invalid,
            "couldn't find PID field in ps output",
            "",
        ));
    };
    let mut out = format!("{head}\n");
    for line in lines.filter(|line| !line.is_empty()) {
        let field = line.split_whitespace().nth(column).unwrap_or_default();
        let pid: i32 = field
            .parse()
            .map_err(|error| Error::invalid("unable to parse pid").source(error))?;
        if pids.contains(&pid) {
            out.push_str(line);
            out.push('\n');
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_selected_by_pid() {
        let text = "UID          PID    PPID CMD\nroot           1       0 init\nroot          42       1 sh -c PID 1\n";
        assert_eq!(
            select(text, &[42]).unwrap(),
            "UID          PID    PPID CMD\nroot          42       1 sh -c PID 1\n"
        );
        assert!(select("CMD\nx\n", &[1]).is_err());
        assert!(select("PID\nx\n", &[1]).is_err());
    }
}
