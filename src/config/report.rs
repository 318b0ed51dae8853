//! What the configuration says of keeping reports.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ByteCount;

/// The records of cold starts in files, as JSON lines, so that a restart forgets none of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Report {
    /// The folder, made if it is not there. For one process: another one that has it is an error.
    pub dir: String,
    /// How large a file may become before the next one is begun, at least 64KiB. The default is about 10,000 records.
    #[serde(default = "Report::default_max_bytes")]
    pub max_bytes: ByteCount,
    /// How many files are kept; the oldest goes first.
    #[serde(default = "Report::default_files")]
    #[schemars(range(min = 1, max = 1000))]
    pub files: usize,
}

// === impl Report ===

impl Report {
    fn default_max_bytes() -> ByteCount {
        ByteCount::mebibytes(16)
    }

    const fn default_files() -> usize {
        8
    }
}
