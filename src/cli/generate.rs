//! Completion scripts and man pages, generated from the definition of the command line.

use std::{fs, io, path::Path};

use clap::Command;
use clap_complete::Shell;

/// Returns the script that completes `anteroom` in a shell.
pub(super) fn completions(shell: Shell, mut command: Command) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "anteroom", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes a page for each visible command. Creates a missing folder.
pub(super) fn man_pages(command: Command, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command, folder)
}
