//! Studies from their inputs to the report.

use super::{
    create,
    draft::{Draft, Item, Output, System},
    kind::Kind,
    study::Study,
    summary::{Difference, OfSystem, summarize},
};
use crate::{error::hint_of, eval::human::statistics::Mean};
use image::{Rgb, RgbImage};
use rusqlite::Connection;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
};

fn write_image(path: &Path, color: u8) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(4, 4, Rgb([color, 0, 0])).save(path).unwrap();
}

fn systems(names: &[&str]) -> Vec<System> {
    names.iter().map(|name| System { name: (*name).to_owned(), is_human: false }).collect()
}

/// Two systems with images for three prompts of two aspects.
fn draft(folder: &Path) -> Draft {
    let item = |number: u8| {
        let outputs = ["a", "b"].map(|system| {
            let path = folder.join(system).join(format!("{number}.png"));
            write_image(&path, 10 * number + system.as_bytes()[0]);
            Output::Image(path)
        });
        let aspect = if number == 3 { "view" } else { "style" };
        Item {
            key: number.to_string(),
            aspect: aspect.to_owned(),
            prompt: format!("第{number}张"),
            image: None,
            outputs: outputs.into(),
        }
    };
    Draft {
        kind: Kind::Images,
        title: "评测".to_owned(),
        seed: u64::MAX,
        raters: 2,
        systems: systems(&["a", "b"]),
        items: (1..=3).map(item).collect(),
    }
}

fn new_study(folder: &Path) -> PathBuf {
    let path = folder.join("study.db");
    create(&path, &draft(folder), || {}).unwrap();
    path
}

/// The output of a system (from 1 on) for an item.
fn output_of(study: &Study, item: i64, system: i64) -> i64 {
    let outputs = study.outputs().unwrap();
    *outputs.iter().find(|(_, output)| output.item == item && output.system == system).unwrap().0
}

#[test]
fn a_study_holds_what_was_drafted_and_replaces_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_study(folder.path());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "it has the raters' tokens");
    fs::remove_dir_all(folder.path().join("a")).unwrap();
    let study = Study::open(&path).unwrap();
    assert_eq!((study.kind, study.title.as_str(), study.seed), (Kind::Images, "评测", u64::MAX));
    assert_eq!(study.systems, systems(&["a", "b"]));
    let output = study.outputs().unwrap().remove(&output_of(&study, 2, 1)).unwrap();
    let stored = image::load_from_memory(&study.image(output.image.unwrap()).unwrap()).unwrap().into_rgb8();
    assert_eq!(stored, RgbImage::from_pixel(4, 4, Rgb([20 + b'a', 0, 0])));
    let tokens: BTreeSet<&str> = study.raters.iter().map(|rater| rater.token.as_str()).collect();
    assert!(tokens.len() == 2 && tokens.iter().all(|token| token.len() == 32), "{tokens:?}");
    drop(study);
    let before = fs::read(&path).unwrap();
    let error = create(&path, &draft(folder.path()), || {}).unwrap_err();
    assert!(error.to_string().contains("a study is never replaced"), "{error:#}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn a_study_that_cannot_be_written_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("study.db");
    let spoiled = |spoil: &dyn Fn(&mut Draft)| {
        let mut draft = draft(folder.path());
        spoil(&mut draft);
        let error = create(&path, &draft, || {}).unwrap_err();
        let left: Vec<_> = folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "a" || name == "b"), "{left:?}");
        format!("{error:#}")
    };
    let image = folder.path().join("b/2.png");
    assert!(spoiled(&|_| fs::remove_file(&image).unwrap()).contains("b/2.png"));
    assert!(spoiled(&|_| fs::write(&image, "text").unwrap()).contains("not a usable image"));
    let wide = |_: &mut Draft| RgbImage::new(4097, 1).save(&image).unwrap();
    assert!(spoiled(&wide).contains("4097 × 1 pixels"));
    assert!(spoiled(&|draft| draft.items[2].key = "1".to_owned()).contains("`1` occurs twice"));
    assert!(spoiled(&|draft| draft.items.clear()).contains("nothing to rate"));
    assert!(spoiled(&|draft| draft.systems = systems(&["a", "a"])).contains("two systems are named `a`"));
    assert!(spoiled(&|draft| drop(draft.items[1].outputs.pop())).contains("lacks the output"));
    assert!(spoiled(&|draft| draft.items[1].prompt = "长".repeat(2001)).contains("longer than 2000"));
}

#[test]
fn other_files_are_no_studies() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.db");
    let refused = |what: &str| {
        let error = Study::open(&path).err().unwrap();
        assert!(format!("{error:#}").contains(what), "{what}: {error:#}");
        assert!(hint_of(&error).is_some(), "{error:#}");
    };
    refused("cannot open");
    for content in [b"".as_slice(), &b"no database at all, ".repeat(100), b"SQLite format 3\0"] {
        fs::write(&path, content).unwrap();
        let what =
            if content.is_empty() { "is empty or the database of another program" } else { "not an SQLite database" };
        refused(what);
    }
    fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE a (b)").unwrap();
    refused("the database of another program");
    for (sql, what) in [
        ("PRAGMA user_version = 2", "a study of version 2, and this vilg reads version 1"),
        ("CREATE TRIGGER t AFTER INSERT ON rating BEGIN DELETE FROM rating; END", "other tables"),
        ("DROP TABLE rating", "other tables"),
        ("ALTER TABLE item ADD COLUMN more TEXT", "other tables"),
        ("PRAGMA foreign_keys = 0; DELETE FROM image", "6 rows refer to others that are missing"),
        ("DELETE FROM study", "does not say what it is about"),
    ] {
        drop(fs::remove_file(&path));
        fs::copy(new_study(&folder.path().join("new")), &path).unwrap();
        fs::remove_file(folder.path().join("new/study.db")).unwrap();
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        refused(what);
    }
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused("is not a file");
}

#[test]
fn a_page_that_is_sent_twice_counts_once_and_is_still_there_after_a_break() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_study(folder.path());
    let mut study = Study::open(&path).unwrap();
    study.begin_serving().unwrap();
    let page = study.pages(1).swap_remove(1);
    let all = |value| {
        let questions = ["clarity", "texture", "relevance"];
        page.outputs.iter().flat_map(|output| questions.map(|question| (*output, question, value))).collect::<Vec<_>>()
    };
    study.rate(1, &all(2)).unwrap();
    study.rate(1, &all(4)).unwrap();
    assert_eq!(study.ratings().unwrap().len(), 6);
    // A process that is killed does not end serving.
    drop(study);
    let mut study = Study::open(&path).unwrap();
    assert!(study.ratings().unwrap().iter().all(|rating| rating.value == 4 && rating.rater == 1));
    assert_eq!(study.rated(1).unwrap(), page.outputs.iter().copied().collect());
    assert!(study.rated(2).unwrap().is_empty());
    let first = study.pages(1);
    assert!(first == Study::open(&path).unwrap().pages(1), "the order stays");
    assert!(study.rate(9, &all(1)).is_err() && study.rate(1, &[(99, "clarity", 1)]).is_err());
    study.end_serving();
    drop(study);
    let names: BTreeSet<_> = folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "only the study and both folders: {names:?}");
}

#[test]
fn ratings_that_no_page_can_give_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_study(folder.path());
    for values in ["(1, 1, 'clarity', 6, 0)", "(1, 1, 'fluency', 1, 0)"] {
        let connection = Connection::open(&path).unwrap();
        connection.execute_batch(&format!("DELETE FROM rating; INSERT INTO rating VALUES {values}")).unwrap();
        drop(connection);
        let error = summarize(&Study::open(&path).unwrap()).unwrap_err();
        assert!(error.to_string().contains("cannot have rated"), "{error:#}");
    }
}

#[test]
fn raters_of_several_processes_do_not_lose_ratings() {
    let folder = tempfile::tempdir().unwrap();
    let (path, raters, items) = (folder.path().join("study.db"), 4, 6);
    let mut draft = draft(folder.path());
    let item = draft.items.remove(0);
    draft.items = (0..items).map(|number| Item { key: number.to_string(), ..item.clone() }).collect();
    create(&path, &Draft { raters, ..draft }, || {}).unwrap();
    let rate = |rater: i64| {
        let mut study = Study::open(&path).unwrap();
        study.begin_serving().unwrap();
        for page in study.pages(rater) {
            let answers: Vec<_> = page.outputs.iter().map(|output| (*output, "clarity", rater)).collect();
            study.rate(rater, &answers).unwrap();
        }
    };
    thread::scope(|scope| (1..=i64::from(raters)).for_each(|rater| drop(scope.spawn(move || rate(rater)))));
    let ratings = Study::open(&path).unwrap().ratings().unwrap();
    assert_eq!(ratings.len(), raters as usize * items as usize * 2);
    assert!(ratings.iter().all(|rating| rating.value == rating.rater));
}

/// Mean and interval, to 5 digits.
fn assert_mean(found: &Mean, mean: f64, interval: Option<[f64; 2]>) {
    let near = |a: f64, b: f64| (a - b).abs() < 1e-5;
    assert!(near(found.mean, mean), "{found:?}");
    let bounds = (found.interval, interval);
    let same = match bounds {
        (Some([a, b]), Some([c, d])) => near(a, c) && near(b, d),
        (None, None) => true,
        _ => false,
    };
    assert!(same, "{bounds:?}");
}

/// Figures by hand, from means of items of 4.5, 2.5, 3.5 and 3, 2, 2, and t(0.975, 2) = 4.302653; alpha by the Python package
/// `krippendorff`.
#[test]
fn the_report_has_the_figures_of_a_calculation_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let mut study = Study::open(&new_study(folder.path())).unwrap();
    let clarity = [[[4, 5], [2, 3], [3, 4]], [[3, 3], [2, 2], [1, 3]]];
    for (system, items) in (1_i64..).zip(clarity) {
        for (item, ratings) in (1_i64..).zip(items) {
            let output = output_of(&study, item, system);
            for (rater, value) in (1_i64..).zip(ratings) {
                study.rate(rater, &[(output, "clarity", value), (output, "texture", 3)]).unwrap();
            }
        }
    }
    // One rating of relevance: no interval, no agreement.
    let output = output_of(&study, 3, 2);
    study.rate(2, &[(output, "relevance", 5)]).unwrap();
    let found = summarize(&study).unwrap();
    assert_eq!((found.items, found.ratings, found.systems.join(" ").as_str()), (3, 25, "a b"));
    assert_eq!(found.raters.iter().map(|rater| (rater.rated, rater.pages)).collect::<Vec<_>>(), [(0, 3), (0, 3)]);
    let [clarity, texture, relevance] = found.questions.as_slice() else { panic!("{found:?}") };
    assert!((clarity.alpha.unwrap() - 0.532_886_334_610_472_4).abs() < 1e-12);
    assert_eq!(clarity.alpha_outputs, 6);
    let of = |systems: &[OfSystem], name: &str| systems.iter().find(|one| one.system == name).unwrap().mean;
    assert_mean(&of(&clarity.systems, "a"), 3.5, Some([1.015862, 5.0]));
    assert_mean(&of(&clarity.systems, "b"), 7.0 / 3.0, Some([1.0, 3.767551]));
    assert_eq!(texture.alpha, None, "all equal");
    assert_mean(&of(&texture.systems, "b"), 3.0, Some([3.0, 3.0]));
    assert_eq!((relevance.systems.len(), relevance.alpha, relevance.alpha_outputs), (1, None, 0));
    assert_mean(&of(&relevance.systems, "b"), 5.0, None);
    let names: Vec<(&str, usize)> = found.aspects.iter().map(|one| (one.aspect.as_str(), one.items)).collect();
    assert_eq!(names, [("style", 2), ("view", 1)]);
    assert_mean(&of(&found.aspects[1].questions[0].systems, "a"), 3.5, None);
    assert_mean(&of(&found.aspects[0].questions[0].systems, "b"), 2.5, Some([1.0, 5.0]));
    let [first, second] = found.differences.as_slice() else { panic!("{:?}", found.differences) };
    // 1.5, 0.5, 1.5
    assert_mean(&first.mean, 7.0 / 6.0, Some([-0.267551, 2.600884]));
    let counts = |one: &Difference| (one.question, one.wins, one.ties, one.losses);
    assert_eq!((counts(first), counts(second)), (("clarity", 3, 0, 0), ("texture", 0, 3, 0)));
    assert!(found.overall.is_empty() && found.pass_rates.is_empty());
}

#[test]
fn samples_are_chosen_by_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let whole = draft(folder.path());
    let chosen = |seed, samples| {
        let mut draft = Draft { seed, ..whole.clone() };
        draft.choose(samples);
        draft.items.into_iter().map(|item| item.key).collect::<Vec<_>>()
    };
    assert_eq!(chosen(1, 0).len(), 3);
    assert_eq!(chosen(1, 2), chosen(1, 2));
    assert!(chosen(1, 2).is_sorted() && chosen(1, 2).len() == 2);
    assert!((0..20).map(|seed| chosen(seed, 1)).collect::<BTreeSet<_>>().len() == 3);
}

/// A study of texts about one image: a row of texts for each item, one of each system.
fn text_study(folder: &Path, kind: Kind, names: &[&str], rows: &[&[&str]]) -> Study {
    let image = folder.join("image.png");
    write_image(&image, 9);
    let item = |(number, texts): (usize, &&[&str])| Item {
        key: number.to_string(),
        aspect: String::new(),
        prompt: String::new(),
        image: Some(image.clone()),
        outputs: texts.iter().map(|text| Output::Text((*text).to_owned())).collect(),
    };
    let items = rows.iter().enumerate().map(item).collect();
    let path = folder.join("texts.db");
    let draft = Draft { kind, title: String::new(), seed: 3, raters: 3, systems: systems(names), items };
    create(&path, &draft, || {}).unwrap();
    Study::open(&path).unwrap()
}

#[test]
fn pass_rates_are_shares_of_ratings_and_majorities_of_answers() {
    let folder = tempfile::tempdir().unwrap();
    let rows: [&[&str]; 3] = [&["甲", "乙"], &["丙", "丁"], &["戊", ""]];
    let mut study = text_study(folder.path(), Kind::Answers, &["model", "human"], &rows);
    // One image for all items; pages have one answer each.
    assert_eq!(study.pages(1).len(), 6);
    assert!(study.items().unwrap().values().all(|item| item.image == Some(1)));
    // The third answer has two ratings, and a tie is no majority.
    for (item, votes) in (1_i64..).zip([&[1, 1, 0][..], &[0, 0, 0], &[1, 0]]) {
        for (rater, vote) in (1_i64..).zip(votes) {
            let [model, human] = [1, 2].map(|system| output_of(&study, item, system));
            study.rate(rater, &[(model, "person", *vote), (human, "person", 1), (human, "quality", 2)]).unwrap();
        }
    }
    let found = summarize(&study).unwrap();
    let [model, human] = found.pass_rates.as_slice() else { panic!("{:?}", found.pass_rates) };
    assert_mean(&model.share, (2.0 / 3.0 + 0.0 + 0.5) / 3.0, Some([0.0, 1.0]));
    assert_eq!((model.majority.hits, model.majority.of), (1, 3));
    assert_mean(&human.share, 1.0, Some([1.0, 1.0]));
    assert_eq!(human.majority.rate, 1.0);
    assert!(found.overall.is_empty());
    let person = found.differences.iter().find(|one| one.question == "person").unwrap();
    assert_eq!((person.wins, person.ties, person.losses), (0, 0, 3));
}

#[test]
fn captions_have_a_mean_of_all_questions() {
    let folder = tempfile::tempdir().unwrap();
    let mut study = text_study(folder.path(), Kind::Captions, &["model"], &[&["甲"], &["乙"]]);
    for (item, [fluency, relevance, richness]) in [(1, [2, 1, 0]), (2, [2, 2, 1])] {
        let output = output_of(&study, item, 1);
        study
            .rate(2, &[(output, "fluency", fluency), (output, "relevance", relevance), (output, "richness", richness)])
            .unwrap();
    }
    let found = summarize(&study).unwrap();
    assert_mean(&found.overall[0].mean, (1.0 + 5.0 / 3.0) / 2.0, Some([0.0, 2.0]));
    assert!(found.pass_rates.is_empty() && found.aspects.is_empty() && found.differences.is_empty());
    assert_eq!(found.raters.iter().map(|rater| rater.rated).collect::<Vec<_>>(), [0, 2, 0]);
}
