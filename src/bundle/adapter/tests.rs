use super::*;

/// The folder that PEFT wrote (`scripts/golden_lora.py`).
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lora")
}

#[test]
fn adapters_of_peft_are_read() {
    let adapter = Adapter::open(&golden()).unwrap();
    assert_eq!((adapter.lora.rank, adapter.lora.alpha, adapter.lora.targets.len()), (3, 5.0, 4));
    // Four layers of four blocks.
    assert_eq!(adapter.tensors.len(), 2 * 4 * 4);
    assert_eq!(adapter.tensors["blocks.3.mlp.fc2.lora_A.weight"].dims(), [3, 64]);
    assert!(adapter.base.is_none());
    let error = adapter.check_base("demo", "digest").unwrap_err();
    assert!(format!("{error:#}").contains("does not say which model"), "{error:#}");
}

#[test]
fn other_methods_and_damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden().join(ADAPTER_WEIGHTS), folder.path().join(ADAPTER_WEIGHTS)).unwrap();
    let config = fs::read_to_string(golden().join(ADAPTER_CONFIG)).unwrap();
    for (from, to, what) in [
        ("\"LORA\"", "\"LOHA\"", "peft_type is LOHA"),
        ("\"use_dora\": false", "\"use_dora\": true", "needs `use_dora`"),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\"qkv\": 9}", "needs `rank_pattern`"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "its bias is \"all\""),
        ("\"r\": 3", "\"r\": 0", "r = 0"),
        ("\"r\": 3", "\"r\": -3", "is damaged"),
        ("\"lora_alpha\": 5.0", "\"lora_alpha\": -5.0", "lora_alpha = -5"),
        ("\"qkv\"", "\"q_proj\"", "is damaged"),
        ("{", "", "is damaged"),
    ] {
        assert!(config.contains(from), "{from}");
        fs::write(folder.path().join(ADAPTER_CONFIG), config.replacen(from, to, 1)).unwrap();
        let error = Adapter::open(folder.path()).unwrap_err();
        assert!(format!("{error:#}").contains(what), "{what}: {error:#}");
    }
    fs::write(folder.path().join(ADAPTER_CONFIG), &config).unwrap();
    Adapter::open(folder.path()).unwrap();
    for (text, what) in [("{}", "is damaged"), ("{\"format\": 2, \"name\": \"x\", \"weights\": \"\"}", "format is 2")] {
        fs::write(folder.path().join(ADAPTER_BASE), text).unwrap();
        let error = Adapter::open(folder.path()).unwrap_err();
        assert!(format!("{error:#}").contains(what), "{what}: {error:#}");
    }
}
