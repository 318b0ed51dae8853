//! Settings for records of cold starts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ByteCount;

/// Records of cold starts as JSON lines in files, which survive a restart.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Report {
    /// Directory, created if missing, for one process.
    pub dir: String,
    /// Size at which a new file is begun, at least 64KiB. The default holds about 10,000 records.
    #[serde(default = "Report::default_max_bytes")]
    pub max_bytes: ByteCount,
    /// Number of files kept; the oldest is deleted first.
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
