//! `make sweep`: the crash sweep over any program with runc's command line, every call, and a
//! score. `sweep [--runtime PATH] [--verb NAME]... [--fault kill|EIO|...|errors]... [--stride N]
//! [--first N] [--alone]`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use coracle_integration::bundle::{Bench, Runtime};
use coracle_integration::sweep::{Asked, ERRORS, Fault, Reach, Verb, sweep};

fn main() -> Result<ExitCode> {
    let mut runtime = None;
    let mut verbs = Vec::new();
    let mut faults = Vec::new();
    let (mut stride, mut first) = (1, 1);
    let mut reaches = vec![Reach::Runtime, Reach::Everyone];
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        if flag == "--alone" {
            reaches = vec![Reach::Runtime];
            continue;
        }
        let value = args
            .next()
            .with_context(|| format!("{flag}: a value is missing"))?;
        match flag.as_str() {
            "--runtime" => runtime = Some(PathBuf::from(&value)),
            "--verb" => {
                let verb = Verb::ALL.into_iter().find(|verb| verb.name() == value);
                verbs.push(verb.with_context(|| format!("no verb {value}"))?);
            }
            "--fault" => match value.as_str() {
                "kill" => faults.push(Fault::Kill),
                "errors" => faults.extend(ERRORS.map(Fault::Error)),
                name => {
                    let error = ERRORS.into_iter().find(|error| *error == name);
                    faults.push(Fault::Error(
                        error.with_context(|| format!("no fault {name}"))?,
                    ));
                }
            },
            "--stride" => stride = value.parse().context("--stride")?,
            "--first" => first = value.parse().context("--first")?,
            _ => bail!("{flag}: unknown"),
        }
    }
    if verbs.is_empty() {
        verbs = Verb::ALL.to_vec();
    }
    if faults.is_empty() {
        faults = [Fault::Kill]
            .into_iter()
            .chain(ERRORS.map(Fault::Error))
            .collect();
    }
    let bench = Bench::new()?;
    let runtime = match runtime {
        None => bench.coracle()?,
        Some(path) => {
            let name = path
                .file_name()
                .context("--runtime")?
                .to_string_lossy()
                .into_owned();
            Runtime::at(&name, path, bench.dir.join("root"))
        }
    };
    let mut clean = true;
    for verb in verbs {
        for reach in &reaches {
            for fault in &faults {
                let started = Instant::now();
                let asked = Asked {
                    verb,
                    faults: vec![*fault],
                    reach: *reach,
                    stride,
                    first,
                    rotate: false,
                };
                let found = sweep(&bench, &runtime, &asked)?;
                clean &= found.wrong.is_empty();
                for line in found.wrong.iter() {
                    println!("WRONG {line}");
                }
                for line in found.late.iter() {
                    println!("late {line}");
                }
                println!(
                    "{} {} {fault} {reach:?}: {}, {:.0} s",
                    runtime.name,
                    verb.name(),
                    found.summary(),
                    started.elapsed().as_secs_f64()
                );
            }
        }
    }
    bench.finish()?;
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
