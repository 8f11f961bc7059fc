//! An image of so many layers that overlay's options fill more than a page, which mount(2) cuts.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::binaries;
use coracle_integration::stage::success;
use coracle_integration::world::sha256;
use serde_json::{Value, json};

/// Paths of layers have some eighty bytes here.
pub const LAYERS: usize = 70;
pub const NAME: &str = "docker.io/coracle/deep:latest";

/// Writes it as an archive that `ctr image import` takes. Every layer but the first has a file of
/// its own, and all of them write /last.
pub fn archive(dir: &Path) -> Result<String> {
    let work = dir.join("deep");
    let (blobs, tree) = (work.join("layout/blobs/sha256"), work.join("tree"));
    fs::create_dir_all(&blobs)?;
    fs::create_dir_all(&tree)?;
    let layout = work.join("layout");
    fs::create_dir(tree.join("proc"))?;
    fs::copy(binaries::probe()?, tree.join("probe"))?;
    let mut layers = vec![layer(&tree, &blobs)?];
    for n in 1..LAYERS {
        fs::remove_dir_all(&tree)?;
        fs::create_dir(&tree)?;
        fs::write(tree.join(format!("layer-{n}")), format!("{n}\n"))?;
        fs::write(tree.join("last"), format!("{n}\n"))?;
        layers.push(layer(&tree, &blobs)?);
    }
    let digests: Vec<&Value> = layers.iter().map(|l| &l["digest"]).collect();
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Env": ["PATH=/"]},
        "rootfs": {"type": "layers", "diff_ids": digests},
    });
    let oci = "application/vnd.oci.image";
    let config = document(&config, &format!("{oci}.config.v1+json"), &blobs)?;
    let manifest_type = format!("{oci}.manifest.v1+json");
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": config,
        "layers": layers,
    });
    let mut manifest = document(&manifest, &manifest_type, &blobs)?;
    manifest["annotations"] = json!({"io.containerd.image.name": NAME});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(
        layout.join("oci-layout"),
        json!({"imageLayoutVersion": "1.0.0"}).to_string(),
    )?;
    let archive = dir.join("deep.tar");
    tar(&layout, &archive)?;
    fs::remove_dir_all(&work)?;
    Ok(archive.display().to_string())
}

fn tar(tree: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.arg("-C").arg(tree).arg("-cf").arg(to).arg(".");
    success(command).map(drop)
}

fn layer(tree: &Path, blobs: &Path) -> Result<Value> {
    let file = blobs.join("new");
    tar(tree, &file)?;
    keep(&file, "application/vnd.oci.image.layer.v1.tar", blobs)
}

fn document(content: &Value, kind: &str, blobs: &Path) -> Result<Value> {
    let file = blobs.join("new");
    fs::write(&file, content.to_string())?;
    keep(&file, kind, blobs)
}

/// Its descriptor, and the file under its digest.
fn keep(file: &Path, kind: &str, blobs: &Path) -> Result<Value> {
    let digest = sha256(file)?;
    ensure!(digest.len() == 64, "sha256sum of {}", file.display());
    let size = File::open(file).context("open a blob")?.metadata()?.len();
    fs::rename(file, blobs.join(&digest))?;
    Ok(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size}))
}
