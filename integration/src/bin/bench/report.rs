//! Writes the comparisons as JSON (every sample), Markdown (medians, ratios) and SVG (bars), and
//! prints the Markdown.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::series::Comparison;

pub fn write(out: &Path, comparisons: &[Comparison]) -> Result<()> {
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let markdown = markdown(comparisons);
    print!("{markdown}");
    fs::write(
        out.join("bench.json"),
        serde_json::to_vec_pretty(comparisons)?,
    )?;
    fs::write(out.join("bench.md"), &markdown)?;
    fs::write(out.join("bench.svg"), svg(comparisons))?;
    println!("\nevery sample: {}", out.join("bench.json").display());
    Ok(())
}

fn markdown(comparisons: &[Comparison]) -> String {
    let mut text = String::new();
    for comparison in comparisons {
        let _ = writeln!(text, "\n### {}\n\n{}\n", comparison.what, comparison.clock);
        let _ = writeln!(
            text,
            "| program | median {} | 10% | 90% | samples | ours / it | goal |",
            comparison.unit
        );
        let _ = writeln!(text, "|---|---|---|---|---|---|---|");
        for (index, series) in comparison.series.iter().enumerate() {
            let ratio = if index == 0 {
                "-".into()
            } else {
                format!("{:.2}", comparison.ratio(index))
            };
            let goal = comparison
                .goals
                .iter()
                .find(|(peer, _)| *peer == series.program);
            let goal = match goal {
                Some((_, goal)) => {
                    let met = if comparison.ratio(index) <= *goal {
                        "met"
                    } else {
                        "MISSED"
                    };
                    format!("<= {goal:.2} {met}")
                }
                None => "-".into(),
            };
            let _ = writeln!(
                text,
                "| {} | {:.2} | {:.2} | {:.2} | {} | {ratio} | {goal} |",
                series.program,
                series.median(),
                series.quantile(0.1),
                series.quantile(0.9),
                series.samples.len(),
            );
        }
    }
    text
}

const ROW: usize = 22;
const LABEL: usize = 250;
const BAR: f64 = 420.0;

/// One bar a program, as long as its median within its comparison; a thin line spans 10% to 90%.
fn svg(comparisons: &[Comparison]) -> String {
    let rows: usize = comparisons.iter().map(|c| c.series.len() + 2).sum();
    let height = rows * ROW + ROW;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
        LABEL as f64 + BAR + 110.0
    );
    let mut y = ROW;
    for comparison in comparisons {
        let _ = writeln!(
            text,
            "<text x=\"8\" y=\"{y}\" font-weight=\"bold\">{}</text>",
            escape(&comparison.what)
        );
        y += ROW;
        let longest = comparison
            .series
            .iter()
            .map(|s| s.quantile(0.9))
            .fold(0.0, f64::max);
        let scale = BAR / longest.max(f64::MIN_POSITIVE);
        for (index, series) in comparison.series.iter().enumerate() {
            let fill = if index == 0 { "#2a6f97" } else { "#b8c4cc" };
            let (low, mid, high) = (series.quantile(0.1), series.median(), series.quantile(0.9));
            let _ = writeln!(
                text,
                "<text x=\"20\" y=\"{y}\">{}</text><rect x=\"{LABEL}\" y=\"{}\" width=\"{:.1}\" \
                 height=\"14\" fill=\"{fill}\"/><path d=\"M{:.1} {m}H{:.1}\" stroke=\"#333\"/>\
                 <text x=\"{:.1}\" y=\"{y}\">{mid:.2} {unit}</text>",
                escape(&series.program),
                y - 11,
                mid * scale,
                LABEL as f64 + low * scale,
                LABEL as f64 + high * scale,
                LABEL as f64 + mid.max(high) * scale + 6.0,
                m = y - 4,
                unit = escape(&comparison.unit),
            );
            y += ROW;
        }
        y += ROW;
    }
    text.push_str("</svg>\n");
    text
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
