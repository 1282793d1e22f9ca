//! Keys renamed since earlier versions. Configuration files, `--set` and checkpoints with the earlier names still work:
//! in the structs each of these keys has its earlier name as a serde alias.

use crate::report;
use toml::Table;

/// Section, earlier name, present name.
const RENAMED: [[&str; 3]; 3] = [
    ["train", "recompute", "activation_checkpointing"],
    ["train", "shard_stage", "zero_stage"],
    ["train", "shard_ranks", "hsdp_shard_size"],
];

/// Replaces earlier names of keys by the present ones, with a warning for each. `place` says where the keys were read.
pub(super) fn rename_keys(table: &mut Table, place: &str) {
    for [section, earlier, name] in RENAMED {
        let Some(keys) = table.get_mut(section).and_then(toml::Value::as_table_mut) else { continue };
        if let Some(value) = keys.remove(earlier) {
            keys.insert(name.to_owned(), value);
            report::warn(format_args!("{place}: `{section}.{earlier}` is now called `{section}.{name}`"));
        }
    }
}

/// The same for the configuration in a checkpoint, without warnings.
pub fn rename_stored_keys(stored: &mut serde_json::Value) {
    for [section, earlier, name] in RENAMED {
        let keys = stored.get_mut(section).and_then(serde_json::Value::as_object_mut);
        if let Some((keys, value)) = keys.and_then(|keys| keys.remove(earlier).map(|value| (keys, value))) {
            keys.insert(name.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Loaded, Origin};

    #[test]
    fn earlier_names_still_work() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("old.toml");
        std::fs::write(&file, "[train]\nrecompute = 3\nshard_stage = 2\n").unwrap();
        let sets = ["train.shard_ranks=4".to_owned(), "train.shard_stage=3".to_owned()];
        let loaded = Loaded::read(Some(&file), &sets).unwrap();
        let train = &loaded.config.train;
        assert_eq!((train.activation_checkpointing, train.zero_stage, train.hsdp_shard_size), (3, 3, 4));
        assert_eq!(loaded.origin("train.activation_checkpointing"), Origin::File);
        assert_eq!(loaded.origin("train.zero_stage"), Origin::Set);
        let both = "[train]\nshard_stage = 2\nzero_stage = 1\n";
        assert!(Config::parse(both, "both.toml").unwrap_err().to_string().contains("duplicate"));
    }

    #[test]
    fn every_renamed_key_has_its_alias() {
        for [section, earlier, name] in RENAMED {
            let config = Config::parse(&format!("[{section}]\n{earlier} = 1\n"), "old.toml").unwrap();
            let mut expected = serde_json::to_value(Config::default()).unwrap();
            expected[section][name] = 1.into();
            assert_eq!(serde_json::to_value(&config).unwrap(), expected, "{earlier}");
            let mut stored = expected.clone();
            let value = stored[section].as_object_mut().unwrap().remove(name).unwrap();
            stored[section][earlier] = value;
            rename_stored_keys(&mut stored);
            assert_eq!(stored, expected, "{earlier}");
        }
    }
}
