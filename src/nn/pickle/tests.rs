use super::*;

/// Python's `pickle.dumps` of an `eval` of "1+1", of a class's instance, and `os.system("true")` in protocol 0.
#[test]
fn calls_are_refused_by_name() {
    let evaluates = b"\x80\x02cbuiltins\neval\nq\x00X\x03\x00\x00\x001+1q\x01\x85q\x02Rq\x03.";
    let makes = b"\x80\x02cdall_e.encoder\nEncoder\nq\x00)\x81q\x01.";
    let stacked = b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.";
    for (bytes, name) in
        [(&evaluates[..], "builtins.eval"), (makes, "dall_e.encoder.Encoder"), (stacked, "posix.system")]
    {
        let error = Pickle::read(bytes).err().map(|error| format!("{error:#}")).unwrap();
        assert!(error.contains(&format!("would call `{name}`")), "{error}");
    }
    let error = Pickle::read(b"cposix\nsystem\n(S'true'\ntR.").err().map(|error| format!("{error:#}")).unwrap();
    assert!(error.contains("0x53"), "protocol 0 is not read at all: {error}");
    assert!(Pickle::read(b"\x80\x02cposix\nsystem\n.").is_ok(), "a name alone runs nothing");
}

/// `pickle.dumps({"a": [1, -2, 300, 70000, 1.5, None, True, b"xy"], "b": ("c", {})}, protocol=4)`.
const PLAIN: &[u8] = b"\x80\x04\x95>\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94]\x94(K\x01J\xfe\xff\xff\xffM,\x01Jp\x11\x01\x00G?\xf8\x00\x00\x00\x00\x00\x00N\x88C\x02xy\x94e\x8c\x01b\x94\x8c\x01c\x94}\x94\x86\x94u.";

#[test]
fn plain_objects_are_read() {
    let (pickle, length) = Pickle::read(PLAIN).unwrap();
    assert_eq!(length, PLAIN.len());
    let entries = pickle.dict(pickle.root()).unwrap();
    assert_eq!(entries.iter().map(|(key, _)| pickle.text(*key).unwrap()).collect::<Vec<_>>(), ["a", "b"]);
    let list = pickle.list(entries[0].1).unwrap();
    let numbers: Vec<&Object> = list.iter().map(|at| pickle.get(*at)).collect();
    let wanted = [1, -2, 300, 70000].map(Object::Int);
    assert_eq!(numbers[..4], wanted.iter().collect::<Vec<_>>());
    assert_eq!(numbers[4..7], [&Object::Float(1.5), &Object::None, &Object::Bool(true)]);
    assert!(matches!(numbers[7], Object::Bytes(range) if &PLAIN[range.clone()] == b"xy"));
}

#[test]
fn cut_and_damaged_pickles_are_errors() {
    for end in 0..PLAIN.len() {
        assert!(Pickle::read(&PLAIN[..end]).is_err(), "cut at {end}");
    }
    for place in 0..PLAIN.len() {
        for bit in 0..8 {
            let mut bytes = PLAIN.to_vec();
            bytes[place] ^= 1 << bit;
            drop(Pickle::read(&bytes));
        }
    }
    // A million nested tuples, and a list that contains itself.
    let deep = [&b"N"[..], &[0x85; 1_000_000], b"."].concat();
    assert!(Pickle::read(&deep).is_ok());
    assert!(Pickle::read(b"]q\x00h\x00a.").is_ok());
}
