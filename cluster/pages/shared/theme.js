// Before the first paint: the theme chosen last time. Without one the system's holds.
document.documentElement.dataset.theme = localStorage.getItem("ernie-theme") ?? "auto";
