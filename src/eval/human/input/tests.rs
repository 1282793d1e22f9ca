//! Files and folders that become items.

use super::{Source, answers, captions, images};
use crate::{
    error::{Result, hint_of},
    eval::human::draft::{Item, Output},
};
use image::{Rgb, RgbImage};
use std::{fs, path::Path};

fn write_image(path: &Path, color: u8) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(4, 4, Rgb([color, 0, 0])).save(path).unwrap();
}

/// Writes `content` and returns its path as a source.
fn source(folder: &Path, name: &str, content: &str, is_human: bool) -> Source {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    Source { name: name.to_owned(), path, is_human }
}

#[test]
fn captions_are_read_in_both_formats() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("v_000001.png"), folder.path().join("v_000002.png"));
    write_image(&one, 1);
    write_image(&two, 1);
    let coco = r#"[{"image_id": 2, "caption": "乙"}, {"image_id": 1, "caption": ""}]"#;
    let lines = "{\"image_id\": 1, \"caption\": \"丙\"}\n\n{\"image_id\": 2, \"caption\": \"丁\", \"score\": -1.5}\n";
    let (a, b) = (source(folder.path(), "a", coco, false), source(folder.path(), "b", lines, false));
    let items = captions(&[a, b], Some(folder.path())).unwrap();
    assert_eq!(items.iter().map(|item| item.key.as_str()).collect::<Vec<_>>(), ["2", "1"]);
    assert_eq!(items[0].image.as_ref(), Some(&two));
    assert_eq!(items[1].outputs, [Output::Text(String::new()), Output::Text("丙".to_owned())]);
    let paths = format!("{{\"image\": {one:?}, \"caption\": \"甲\", \"score\": 0}}\n");
    let items = captions(&[source(folder.path(), "c", &paths, false)], None).unwrap();
    assert_eq!(items[0].image.as_ref(), Some(&one));
}

#[test]
fn captions_that_do_not_fit_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    (1..=2).for_each(|number| write_image(&images.join(format!("{number}.png")), number));
    let both = r#"[{"image_id": 1, "caption": "甲"}, {"image_id": 2, "caption": "乙"}]"#;
    let one = r#"[{"image_id": 1, "caption": "甲"}]"#;
    let twice = r#"[{"image_id": 1, "caption": "甲"}, {"image_id": 1, "caption": "乙"}]"#;
    for (first, second, what) in [
        (both, one, "has no caption of image `2`"),
        (one, both, "has a caption of image `2`, and"),
        (twice, both, "two captions of image `1`"),
        (both, twice, "two captions of image `1`"),
        ("", both, "there is nothing in"),
        ("[]", both, "there is nothing in"),
        ("[", both, "bad "),
        (r#"[{"caption": "甲"}]"#, both, "without `image` or `image_id`"),
        (r#"[{"image_id": 1}]"#, both, "missing field `caption`"),
        (r#"[{"image_id": 1, "caption": null}]"#, both, "expected text in quotes"),
        (r#"[{"image_id": 3, "caption": "甲"}]"#, both, "has no image `3`"),
        (r#"[{"image_id": "../1", "caption": "甲"}]"#, r#"[{"image_id": "../1", "caption": "甲"}]"#, "ok"),
        ("{\"image_id\": 1, \"caption\": \"甲\"}\nx\n", both, "line 2"),
    ] {
        let sources = [source(folder.path(), "a", first, false), source(folder.path(), "b", second, false)];
        match captions(&sources, Some(&images)) {
            Ok(items) => assert!(what == "ok" && items[0].image == Some(images.join("1.png")), "{first}"),
            Err(error) => {
                assert!(format!("{error:#}").contains(what) && hint_of(&error).is_some(), "{what}: {error:#}");
            }
        }
    }
    let error = captions(&[source(folder.path(), "a", one, false)], None).unwrap_err();
    assert!(hint_of(&error).unwrap().contains("--image-folder"), "{error:#}");
}

#[test]
fn answers_of_people_come_from_lines_or_samples() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("sheep.png");
    write_image(&image, 1);
    let line = |question: &str, answer: &str| {
        format!("{}\n", serde_json::json!({ "image": image, "question": question, "answer": answer, "score": -0.1 }))
    };
    let lines = [line("几只羊？", "三只"), line(" 在哪里？", "草地上")].concat();
    let model = source(folder.path(), "model.jsonl", &lines, false);
    // The data knows more questions than were asked, and several answers to one.
    let data = folder.path().join("data");
    write_image(&data.join("sheep.png"), 1);
    let meta = serde_json::json!({ "questions": [
        { "question": "在哪里？", "answer": "山坡" },
        { "question": "几只羊？", "answer": "两只" },
        { "question": "几只羊？", "answer": "二" },
        { "question": "天气好吗？", "answer": "好" },
    ] });
    fs::write(data.join("sheep.json"), meta.to_string()).unwrap();
    fs::write(data.join("sheep.txt"), "羊").unwrap();
    let human = Source { name: "human".to_owned(), path: data, is_human: true };
    let items = answers(&[model.clone(), human])?;
    let texts = |item: &Item| {
        let text = |output: &Output| match output {
            Output::Text(text) => text.clone(),
            Output::Image(_) => panic!("{output:?}"),
        };
        item.outputs.iter().map(text).collect::<Vec<_>>()
    };
    assert_eq!(items.iter().map(texts).collect::<Vec<_>>(), [["三只", "两只"], ["草地上", "山坡"]]);
    assert_eq!((items[1].prompt.as_str(), items[1].image.as_ref()), ("在哪里？", Some(&image)));
    for (people, what) in [
        (line("几只羊？", "两只"), "has no answer to “在哪里？”"),
        ([lines.as_str(), &lines].concat(), "twice"),
        (line(" ", "x"), "a question in "),
        ("{}\n".to_owned(), "missing field `image`"),
    ] {
        let human = source(folder.path(), "human.jsonl", &people, true);
        let error = format!("{:#}", answers(&[model.clone(), human]).unwrap_err());
        assert!(error.contains(what), "{what}: {error}");
    }
    let more = source(folder.path(), "more.jsonl", &[lines.as_str(), &line("天气？", "好")].concat(), false);
    let error = answers(&[model, more.clone()]).unwrap_err();
    assert!(error.to_string().contains("answers “天气？”"), "{error:#}");
    fs::remove_file(&image).unwrap();
    assert!(answers(&[more]).unwrap_err().to_string().contains("there is no image"));
    Ok(())
}

#[test]
fn images_belong_to_prompts_by_number_or_id() {
    let folder = tempfile::tempdir().unwrap();
    let system = |name: &str, files: &[&str]| {
        let path = folder.path().join(name);
        files.iter().for_each(|file| write_image(&path.join(file), 1));
        Source { name: name.to_owned(), path, is_human: false }
    };
    let (a, b) = (system("a", &["x-1.png", "x-2.png"]), system("b", &["01.png", "02.png", "03.png"]));
    let prompts = folder.path().join("prompts.tsv");
    fs::write(&prompts, "aspect\tprompt\nview\t月亮\nstyle\t太阳\n").unwrap();
    let items = images(std::slice::from_ref(&a), &prompts).unwrap();
    assert_eq!(items[1].outputs, [Output::Image(a.path.join("x-2.png"))]);
    assert_eq!((items[1].prompt.as_str(), items[1].aspect.as_str(), items[1].key.as_str()), ("太阳", "style", "2"));
    let error = images(&[a.clone(), b.clone()], &prompts).unwrap_err();
    assert!(error.to_string().contains("3 images in ") && error.to_string().contains("for 2 prompts"), "{error:#}");
    fs::write(&prompts, "id\tprompt\n2\t月亮\n").unwrap();
    let items = images(&[a.clone(), b], &prompts).unwrap();
    assert_eq!(items.len(), 1);
    fs::write(&prompts, "id\tprompt\n7\t月亮\n").unwrap();
    assert!(images(&[a], &prompts).unwrap_err().to_string().contains("has no image `7`"));
}
