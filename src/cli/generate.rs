//! `virtnode completions` and `virtnode man`, generated from the definition of the command line.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;

use super::Exit;
use super::output::print;

#[derive(Debug, Args)]
pub(super) struct CompletionsCommand {
    /// Shell to complete for
    shell: Shell,
}

impl CompletionsCommand {
    pub(super) fn run(self, mut command: Command) -> anyhow::Result<Exit> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "virtnode", &mut script);
        print(&String::from_utf8(script)?)?;
        Ok(Exit::Done)
    }
}

#[derive(Debug, Args)]
pub(super) struct ManCommand {
    /// Directory to write one page per command into, instead of printing one
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl ManCommand {
    pub(super) fn run(self, command: Command) -> anyhow::Result<Exit> {
        match self.directory {
            Some(directory) => clap_mangen::generate_to(command, &directory)
                .with_context(|| format!("cannot write to {}", directory.display()))?,
            None => {
                let mut page = Vec::new();
                clap_mangen::Man::new(command).render(&mut page)?;
                print(&String::from_utf8(page)?)?;
            }
        }
        Ok(Exit::Done)
    }
}
