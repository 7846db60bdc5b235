//! Tells the program which revision it was built from, for `millpond_build_info`.
//!
//! `MILLPOND_REVISION` in the environment wins (packagers build without git); then git is asked; else `unknown`.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=MILLPOND_REVISION");
    println!("cargo::rerun-if-changed=.git/HEAD");
    println!("cargo::rerun-if-changed=.git/refs");
    let revision =
        std::env::var("MILLPOND_REVISION").ok().or_else(git_revision).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=MILLPOND_REVISION={revision}");
}

fn git_revision() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
