"""A headless Chromium, for the scripts that drive pages of vilg."""
import subprocess

from selenium import webdriver


def browser(width, height, language=None):
    options = webdriver.ChromeOptions()
    for option in ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", f"--window-size={width},{height}"]:
        options.add_argument(option)
    if language:
        options.add_argument(f"--lang={language}")
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.binary_location = subprocess.check_output(["which", "chromium"], text=True).strip()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = subprocess.check_output(["which", "chromedriver"], text=True).strip()
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def shot(page, folder, name):
    """Saves a screenshot, if there is a folder for them."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        page.save_screenshot(str(folder / f"{name}.png"))


def check_origins(page, url, expected=None):
    """Everything on the page comes from the server, and the browser has no complaints but those that contain `expected`."""
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith((url, "data:")) for name in loaded), loaded
    complaints = [one for one in page.get_log("browser") if not expected or expected not in one["message"]]
    assert not complaints, complaints
    return loaded
