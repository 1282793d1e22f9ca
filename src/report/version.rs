//! The version of this program. `build.rs` provides what Cargo does not know.

use serde::Serialize;
use std::fmt;

/// The version of this build, as `vilg --version` prints it and run and model folders record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Version {
    /// The version of the package, such as `0.1.0`.
    pub version: &'static str,
    /// Full hash of the commit that was checked out at build time; `None` if built outside a git repository.
    /// Uncommitted changes are not visible in it.
    pub commit: Option<&'static str>,
    /// Enabled Cargo features, separated by spaces.
    pub features: &'static str,
    /// Target triple, such as `x86_64-unknown-linux-gnu`.
    pub target: &'static str,
}

/// The version of this build.
pub const fn version() -> Version {
    Version {
        version: env!("CARGO_PKG_VERSION"),
        commit: option_env!("VILG_COMMIT"),
        features: env!("VILG_FEATURES"),
        target: env!("VILG_TARGET"),
    }
}

/// `0.1.0 (commit 5efb1c0a2d4e, features: cuda nccl, x86_64-unknown-linux-gnu)`
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.version)?;
        if let Some(commit) = self.commit {
            write!(f, "commit {}, ", commit.get(..12).unwrap_or(commit))?;
        }
        let features = if self.features.is_empty() { "none" } else { self.features };
        write!(f, "features: {features}, {})", self.target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_one_line_with_or_without_a_commit() {
        let hash = "0123456789abcdef0123456789abcdef01234567";
        let built = Version { version: "1.2.3", commit: Some(hash), features: "cuda nccl", target: "x86_64-linux" };
        assert_eq!(built.to_string(), "1.2.3 (commit 0123456789ab, features: cuda nccl, x86_64-linux)");
        let bare = Version { commit: None, features: "", ..built };
        assert_eq!(bare.to_string(), "1.2.3 (features: none, x86_64-linux)");
        let version = version();
        assert!(version.commit.is_none_or(|commit| commit.len() >= 40), "{version:?}");
        assert!(version.target.contains('-') && !version.version.is_empty(), "{version:?}");
    }
}
