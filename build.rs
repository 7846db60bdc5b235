//! Tells the program which revision it was built from, for `millpond_build_info`.
//!
//! If `MILLPOND_REVISION` is set in the environment, it is the revision. Packagers set it to build without git.
//! Otherwise the revision comes from git. If git has none, it is `unknown`.

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
